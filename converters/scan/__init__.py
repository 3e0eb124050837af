"""Scan: every model artifact below a folder, what each one is, and which drafter belongs to which target."""
