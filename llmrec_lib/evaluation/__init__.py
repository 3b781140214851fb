"""How a recommender is judged: full ranking, per-user values first, paired comparisons."""

from llmrec_lib.evaluation.evaluate import Evaluation, evaluate
from llmrec_lib.evaluation.statistics import compare, compare_many

__all__ = ["Evaluation", "compare", "compare_many", "evaluate"]
