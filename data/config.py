"""What to read, what to keep of it, and how to cut it into training, validation and test."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class Columns:
    """Column names of a CSV, Parquet, RecBole or Hugging Face source; if unset, the usual ones."""

    user: str | None = None
    """Column with the user's id (usual names: userId, user_id, user)."""
    item: str | None = None
    """Column with the item's id (usual names: movieId, item_id, item)."""
    rating: str | None = None
    """Column with the rating (usual name: rating); without one every event has rating 1."""
    timestamp: str | None = None
    """Column with the time, a number (usual name: timestamp); without one the row order is the time."""
    title: str | None = None
    """Column with the item's title (usual name: title)."""
    categories: str | None = None
    """Column with the item's categories, separated by | (usual names: genres, categories)."""


@dataclass
class DataConfig:
    """Where the ratings come from, which of them are kept, and how they are split."""

    source: str = "ml-100k"
    """ml-100k, ml-1m, ml-10m, ml-20m, ml-32m, ml-latest-small, sample, a folder of the data root, the path of
    a file or folder, or the id of a Hugging Face dataset (OWNER/NAME)."""
    root: Path | None = None
    """Folder with the datasets by name; receives downloads ($SHARDREC_DATA, else ~/.cache/shardrec)."""
    cache: Path | None = None
    """Where prepared prompts are kept (~/.cache/shardrec)."""
    columns: Columns = field(default_factory=Columns)
    """Column names of sources that do not fix them."""
    min_rating: float = 0.0
    """Keep events with at least this rating; 0 keeps all."""
    duplicates: Literal["keep", "first", "last"] = "keep"
    """Of repeated events of one user with one item, keep all, the earliest or the latest."""
    user_core: int = 0
    """Drop users with fewer events than this, and repeat with items until nothing changes; 0 keeps all."""
    item_core: int = 0
    """Drop items with fewer events than this, and repeat with users until nothing changes; 0 keeps all."""
    on_bad_rows: Literal["error", "skip"] = "error"
    """Malformed rows: stop and show the first few, or drop them and report how many."""
    split: Literal["leave-one-out", "global-time"] = "leave-one-out"
    """Hold out each user's last two events, or all after a moment. A source that comes split stays so."""
    valid_quantile: float = 0.8
    """global-time: validation starts at this quantile of all event times."""
    test_quantile: float = 0.9
    """global-time: test starts at this quantile of all event times."""
    cold_items: float = 0.0
    """Part of the items that the test asks for, 0 to 1, that training and validation never meet: new items."""
    cold_seed: int = 0
    """Which items those are."""
    sample_users: int = 500
    """sample: number of users."""
    sample_series: int = 50
    """sample: number of film series, six films each."""
    sample_seed: int = 0
    """sample: seed of titles, popularity and histories."""

    @property
    def cache_folder(self) -> Path:
        """Where prepared prompts are kept."""
        return self.cache or Path.home() / ".cache" / "shardrec"
