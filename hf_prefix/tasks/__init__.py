"""Tasks: where inputs and references come from, in one form (`Record`) for all of them."""

from hf_prefix.tasks.data_to_text import DART, E2E, PAIRS, WEBNLG
from hf_prefix.tasks.folders import TASK_FORMATS, load_task_folder, recognize_format
from hf_prefix.tasks.hub import HubDataset, load_hub_dataset, open_hub_dataset
from hf_prefix.tasks.linearization import Linearization, linearize_slots, linearize_triples
from hf_prefix.tasks.low_data import (
    LOW_DATA_SIZES,
    TRAINING_SEEDS,
    XSUM_SUBSET_SEEDS,
    low_data_subset,
    subset,
)
from hf_prefix.tasks.paper_linearization import paper_dart_triples, paper_slots, paper_webnlg_triples
from hf_prefix.tasks.records import Record, read_records, training_pairs
from hf_prefix.tasks.summarization import XSUM
from hf_prefix.tasks.task_format import TaskFormat

__all__ = [
    "DART",
    "E2E",
    "LOW_DATA_SIZES",
    "PAIRS",
    "TASK_FORMATS",
    "TRAINING_SEEDS",
    "WEBNLG",
    "XSUM",
    "XSUM_SUBSET_SEEDS",
    "HubDataset",
    "Linearization",
    "Record",
    "TaskFormat",
    "linearize_slots",
    "linearize_triples",
    "load_hub_dataset",
    "load_task_folder",
    "low_data_subset",
    "open_hub_dataset",
    "paper_dart_triples",
    "paper_slots",
    "paper_webnlg_triples",
    "read_records",
    "recognize_format",
    "subset",
    "training_pairs",
]
