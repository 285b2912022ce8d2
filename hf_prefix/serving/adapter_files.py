"""What the files of a saved prefix hold, in memory and as it is: a projection stays one."""

from dataclasses import dataclass

from torch import Tensor

from hf_prefix.config import PrefixConfig
from hf_prefix.sharing.saved_prefix import read_config, read_weights


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """Configuration and tensors of one saved prefix.

    Args:
        source: Folder or Hub id that they come from.
        config: The configuration.
        tensors: The tensors on the CPU, under the names that they have in the file.
    """

    source: str
    config: PrefixConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, source: str) -> "AdapterFiles":
        """Read the files of a prefix.

        Args:
            source: Folder or Hub id, an export or a training checkpoint.

        Raises:
            PrefixError: There is no prefix.
            PrefixMismatchError: Its weights are missing or damaged.
            UnsupportedCallError: They are pickled, or divided among several files.
        """
        return cls(source, read_config(source), read_weights(source))

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
