"""Measuring a model on tasks: generation, protocols, records, statistics."""

from llm_adapters.evaluation.records import Record as Record
from llm_adapters.evaluation.results import Evaluation as Evaluation
from llm_adapters.evaluation.results import TaskResult as TaskResult
from llm_adapters.evaluation.results import compare_evaluations as compare_evaluations
from llm_adapters.evaluation.results import measures as measures
from llm_adapters.evaluation.results import read_evaluation as read_evaluation
from llm_adapters.evaluation.results import rescore as rescore
from llm_adapters.evaluation.results import spread_evaluations as spread_evaluations
from llm_adapters.evaluation.runner import evaluate as evaluate
from llm_adapters.evaluation.runner import load_questions as load_questions
