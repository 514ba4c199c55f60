from .analysis.batch_eigenvalues import (
    BatchSettings as BatchSettings,
)
from .analysis.batch_eigenvalues import (
    batch_eigenvalues as batch_eigenvalues,
)
from .analysis.calibration import (
    CalibrationSettings as CalibrationSettings,
)
from .analysis.calibration import (
    calibrate as calibrate,
)
from .analysis.context import AnalysisError as AnalysisError
from .analysis.flatness.average_sharpness import (
    average_sharpness as average_sharpness,
)
from .analysis.flatness.average_sharpness import (
    pac_bayes_sigma as pac_bayes_sigma,
)
from .analysis.flatness.average_sharpness import (
    smoothed_loss as smoothed_loss,
)
from .analysis.flatness.critical_sharpness import critical_sharpness as critical_sharpness
from .analysis.flatness.flatness import flatness as flatness
from .analysis.flatness.relative import (
    fisher_rao as fisher_rao,
)
from .analysis.flatness.relative import (
    relative_flatness as relative_flatness,
)
from .analysis.flatness.settings import FlatnessSettings as FlatnessSettings
from .analysis.flatness.worst_case import (
    m_sharpness as m_sharpness,
)
from .analysis.flatness.worst_case import (
    sam_sharpness as sam_sharpness,
)
from .analysis.flatness.worst_case import (
    worst_case as worst_case,
)
from .analysis.landscape import (
    LandscapeSettings as LandscapeSettings,
)
from .analysis.landscape import (
    landscape as landscape,
)
from .analysis.operator_spectrum.eigenvectors import (
    gradient_shares as gradient_shares,
)
from .analysis.operator_spectrum.eigenvectors import (
    layer_shares as layer_shares,
)
from .analysis.operator_spectrum.eigenvectors import (
    participation as participation,
)
from .analysis.operator_spectrum.jacobian_diagonal import jacobian_diagonal as jacobian_diagonal
from .analysis.settings import SpectrumSettings as SpectrumSettings
from .analysis.spectrum import (
    layer_objectives as layer_objectives,
)
from .analysis.spectrum import (
    spectrum as spectrum,
)
from .analysis.training_path import (
    SavedWeights as SavedWeights,
)
from .analysis.training_path import (
    TrainingPathSettings as TrainingPathSettings,
)
from .analysis.training_path import (
    saved_weights as saved_weights,
)
from .analysis.training_path import (
    training_path as training_path,
)
from .analysis.true_hessian.analysis import true_hessian as true_hessian
from .analysis.true_hessian.parts import (
    true_forms as true_forms,
)
from .analysis.true_hessian.parts import (
    true_operator as true_operator,
)
from .analysis.true_hessian.parts import (
    true_projection as true_projection,
)
from .analysis.true_hessian.parts import (
    true_trace as true_trace,
)
from .analysis.true_hessian.settings import TrueHessianSettings as TrueHessianSettings
from .checks import ObjectiveError as ObjectiveError
from .io.json import (
    ResultError as ResultError,
)
from .io.json import (
    load_result as load_result,
)
from .io.json import (
    save_result as save_result,
)
from .io.torch_archive import (
    ArchiveError as ArchiveError,
)
from .io.torch_archive import (
    read_archive as read_archive,
)
from .io.versions import versions as versions
from .linalg.diagonal import (
    DiagonalEstimate as DiagonalEstimate,
)
from .linalg.diagonal import (
    diagonal as diagonal,
)
from .linalg.lanczos import (
    Eigenpairs as Eigenpairs,
)
from .linalg.lanczos import (
    eigenpairs as eigenpairs,
)
from .linalg.power_iteration import power_iteration as power_iteration
from .linalg.spectral_density import (
    DensityEstimate as DensityEstimate,
)
from .linalg.spectral_density import (
    density as density,
)
from .linalg.spectral_functions import (
    effective_dimension as effective_dimension,
)
from .linalg.spectral_functions import (
    log_determinant as log_determinant,
)
from .linalg.spectral_functions import (
    negative_share as negative_share,
)
from .linalg.stein import SteinHessian as SteinHessian
from .linalg.trace import (
    TraceEstimate as TraceEstimate,
)
from .linalg.trace import (
    trace as trace,
)
from .nonfinite import first_not_finite as first_not_finite
from .objective import (
    Objective as Objective,
)
from .objective import (
    make_objective as make_objective,
)
from .operators.base import (
    Composed as Composed,
)
from .operators.base import (
    Dense as Dense,
)
from .operators.base import (
    Operator as Operator,
)
from .operators.base import (
    dense as dense,
)
from .operators.base import (
    from_scipy as from_scipy,
)
from .operators.base import (
    projected as projected,
)
from .operators.base import (
    scaled as scaled,
)
from .operators.base import (
    shifted as shifted,
)
from .operators.base import (
    summed as summed,
)
from .operators.base import (
    symmetry_error as symmetry_error,
)
from .operators.base import (
    to_scipy as to_scipy,
)
from .operators.curvature import (
    CurvatureOperator as CurvatureOperator,
)
from .operators.curvature import (
    fisher as fisher,
)
from .operators.curvature import (
    ggn as ggn,
)
from .operators.curvature import (
    hessian as hessian,
)
from .operators.gram_estimate import GramEstimate as GramEstimate
from .operators.gram_estimate import gram_estimate as gram_estimate
from .perturbation import (
    filter_norms as filter_norms,
)
from .perturbation import (
    noise_scales as noise_scales,
)
from .plots.calibration import calibration_figure as calibration_figure
from .plots.landscape import landscape_figure as landscape_figure
from .plots.landscapes import (
    landscapes_figure as landscapes_figure,
)
from .plots.landscapes import (
    surfaces_figure as surfaces_figure,
)
from .plots.spectrum import (
    layers_figure as layers_figure,
)
from .plots.spectrum import (
    rank_figure as rank_figure,
)
from .plots.spectrum import (
    samples_figure as samples_figure,
)
from .plots.spectrum import (
    spectrum_figure as spectrum_figure,
)
from .plots.spectrum import (
    trajectory_figure as trajectory_figure,
)
from .plots.style import save_figure as save_figure
from .plots.training_path import training_path_figure as training_path_figure
from .results.calibration import CalibrationResult as CalibrationResult
from .results.flatness import (
    FlatnessResult as FlatnessResult,
)
from .results.flatness import (
    Metric as Metric,
)
from .results.landscape import (
    LandscapeResult as LandscapeResult,
)
from .results.landscape import (
    Line as Line,
)
from .results.landscape import (
    Plane as Plane,
)
from .results.operator_spectrum import (
    Density as Density,
)
from .results.operator_spectrum import (
    Eigenvalue as Eigenvalue,
)
from .results.operator_spectrum import (
    Functional as Functional,
)
from .results.operator_spectrum import (
    Search as Search,
)
from .results.operator_spectrum import (
    Spectrum as Spectrum,
)
from .results.operator_spectrum import (
    Trace as Trace,
)
from .results.spectrum import (
    SamplePoint as SamplePoint,
)
from .results.spectrum import (
    SpectrumResult as SpectrumResult,
)
from .results.spectrum import (
    load_spectrum as load_spectrum,
)
from .results.spectrum import (
    save_spectrum as save_spectrum,
)
from .results.training_path import (
    Snapshot as Snapshot,
)
from .results.training_path import (
    TrainingPath as TrainingPath,
)
from .results.true_hessian import (
    DrawMean as DrawMean,
)
from .results.true_hessian import (
    TrueHessianResult as TrueHessianResult,
)
from .results.true_hessian import (
    load_true_hessian as load_true_hessian,
)
from .resume import (
    Phases as Phases,
)
from .resume import (
    ResumeError as ResumeError,
)

__version__: str
