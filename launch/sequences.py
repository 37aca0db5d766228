"""Recommenders of item ids, built from a catalogue and a split."""

from data.batches import EvaluationSequences, Examples, TrainingSequences
from data.negatives import UniformNegatives
from models.gru4rec import GRU4Rec, GRU4RecConfig
from models.lrurec import LRURec, LRURecConfig
from models.sasrec import SASRec, SASRecConfig
from models.sequence_recommender import SequenceConfig, SequenceRecommender

from .setting import Built, EveryPosition, Setting


def sequence_recommender(config: SequenceConfig, num_items: int) -> SequenceRecommender:
    """Return the model that its settings are of."""
    if isinstance(config, GRU4RecConfig):
        return GRU4Rec(config, num_items)
    if isinstance(config, LRURecConfig):
        return LRURec(config, num_items)
    assert isinstance(config, SASRecConfig)
    return SASRec(config, num_items)


def build_sequence_recommender(setting: Setting) -> Built:
    config: SequenceConfig = setting.method

    def training() -> Examples:
        negatives = None
        if config.loss != "cross-entropy":
            negatives = UniformNegatives(setting.split, config.num_negatives, setting.seed)
        return TrainingSequences(setting.split, config.window, config.windows, negatives)

    return Built(
        sequence_recommender(config, setting.catalog.num_items),
        training,
        lambda split, phase: EvaluationSequences(split, phase, config.window),
        every_position=EveryPosition(
            config.window, lambda split, spans: TrainingSequences(split, config.window, spans=spans)
        ),
    )
