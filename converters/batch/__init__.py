"""Batch: many conversions and verifications; what is up to date is skipped, what fails stops no other."""
