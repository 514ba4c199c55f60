from .adapters.adapt_network import (
    Adapted as Adapted,
)
from .adapters.adapt_network import (
    adapt as adapt,
)
from .adapters.base import AdapterError as AdapterError
from .adapters.libraries.nir import read_nir as read_nir
from .adapters.state_dict import (
    load_weights as load_weights,
)
from .adapters.state_dict import (
    read_weights as read_weights,
)
from .checkpoint import (
    Checkpoint as Checkpoint,
)
from .checkpoint import (
    CheckpointError as CheckpointError,
)
from .checkpoint import (
    load_checkpoint as load_checkpoint,
)
from .checkpoint import (
    save_checkpoint as save_checkpoint,
)
from .data.corruptions import corrupted as corrupted
from .data.datasets import (
    Dataset as Dataset,
)
from .data.datasets import (
    load_dataset as load_dataset,
)
from .data.download import DataError as DataError
from .data.encoding import encode as encode
from .data.spec import DataSpec as DataSpec
from .initializers.catalog import (
    Initialized as Initialized,
)
from .initializers.catalog import (
    initialize as initialize,
)
from .initializers.catalog import (
    initialize_module as initialize_module,
)
from .initializers.names import INITIALIZERS as INITIALIZERS
from .layer_statistics import (
    LayerStatistics as LayerStatistics,
)
from .layer_statistics import (
    observe as observe,
)
from .losses import (
    LOSSES as LOSSES,
)
from .losses import (
    cross_entropy as cross_entropy,
)
from .losses import (
    mean_square as mean_square,
)
from .losses import (
    tet as tet,
)
from .losses import (
    time_first as time_first,
)
from .networks import (
    Network as Network,
)
from .networks import (
    Spec as Spec,
)
from .neurons import (
    Dynamics as Dynamics,
)
from .neurons import (
    Neuron as Neuron,
)
from .smoothed_operator import smoothed as smoothed
from .surrogates import (
    Surrogate as Surrogate,
)
from .surrogates import (
    expected_square as expected_square,
)
from .surrogates import (
    spike as spike,
)
from .training.loop import (
    evaluate as evaluate,
)
from .training.loop import (
    train as train,
)
from .training.spec import TrainingSpec as TrainingSpec

__version__: str
