from .api.analyses import analyze as analyze
from .api.analyses import flatness as flatness
from .api.analyses import landscape as landscape
from .api.analyses import true_hessian as true_hessian
from .api.batches import BatchHistogram as BatchHistogram
from .api.batches import lambda_max_histogram as lambda_max_histogram
from .api.compared import Compared as Compared
from .api.compared import compare as compare
from .api.files import load as load
from .api.flatness import Flatness as Flatness
from .api.landscape import Landscape as Landscape
from .api.monitor import Monitor as Monitor
from .api.spectrum import Analysis as Analysis
from .api.spectrum import Curvature as Curvature
from .api.true_hessian import TrueHessian as TrueHessian
from .jobs.given import Opening as Opening

__version__: str
