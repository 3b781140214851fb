"""Run the study's chapters, keep every unit's result at once, and say where each number comes from."""

from llmrec_lib.study.parameters import ParameterError, declared_parameters
from llmrec_lib.study.results import Study
from llmrec_lib.study.runner import ChapterOutcome, run

__all__ = ["ChapterOutcome", "ParameterError", "Study", "declared_parameters", "run"]
