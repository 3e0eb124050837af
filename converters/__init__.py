"""convert-drafter: turn a published speculative-decoding drafter into a GGUF, with every fact checked.

The public Python face; the command line calls the same functions. torch and transformers are not imported here.
"""

from __future__ import annotations

from convert_drafter.converters.convert import Conversion, ConvertJob, Report, convert, prepare, write_conversion
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.errors import DrafterError, MissingEngine, Problems, WrongInput, WrongUsage
from convert_drafter.converters.inspection import Inspection, inspect
from convert_drafter.converters.launch.launching import Launch, LaunchJob, launch
from convert_drafter.converters.model_key import normalize_model_key
from convert_drafter.converters.quantize import (
    Quantization,
    QuantizeJob,
    QuantizeReport,
    prepare_quantize,
    quantize,
    write_quantization,
)
from convert_drafter.converters.redialect import (
    Redialection,
    RedialectJob,
    RedialectReport,
    prepare_redialect,
    redialect,
    write_redialection,
)
from convert_drafter.converters.scan.found import Scan
from convert_drafter.converters.scan.scan import scan
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.converters.verdict import Verdict
from convert_drafter.converters.verify.job import VerifyJob
from convert_drafter.converters.verify.verify import verify

__all__ = [
    "Conversion",
    "ConvertJob",
    "DrafterError",
    "Inspection",
    "Launch",
    "LaunchJob",
    "MissingEngine",
    "Problems",
    "Quantization",
    "QuantizeJob",
    "QuantizeReport",
    "RedialectJob",
    "RedialectReport",
    "Redialection",
    "Report",
    "Scan",
    "TypeOptions",
    "Verdict",
    "VerifyJob",
    "WrongInput",
    "WrongUsage",
    "convert",
    "doctor",
    "inspect",
    "launch",
    "normalize_model_key",
    "prepare",
    "prepare_quantize",
    "prepare_redialect",
    "quantize",
    "redialect",
    "scan",
    "verify",
    "write_conversion",
    "write_quantization",
    "write_redialection",
]
