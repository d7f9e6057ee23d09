"""Code that all packages share: files, jobs, statistics, weights, encoders.

`pathcore` imports none of the other packages of this project.
"""

from typing import TYPE_CHECKING

from pathcore.lazy import lazy_exports

if TYPE_CHECKING:
    from pathcore.encoders import Encoder as Encoder
    from pathcore.encoders import create_encoder as create_encoder
    from pathcore.encoders import get_preset as get_preset
    from pathcore.encoders import list_encoders as list_encoders
    from pathcore.weights import CheckpointError as CheckpointError
    from pathcore.weights import read_state_dict as read_state_dict

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    "gigapath",
    {
        "CheckpointError": "pathcore.weights",
        "Encoder": "pathcore.encoders",
        "create_encoder": "pathcore.encoders",
        "get_preset": "pathcore.encoders",
        "list_encoders": "pathcore.encoders",
        "read_state_dict": "pathcore.weights",
    },
)
