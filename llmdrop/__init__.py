"""llmdrop: which layers of a language model can you throw away, and what do you get for it?"""

from . import anatomy
from .anatomy import find_anatomy
from .calibration import Calibration, load_calibration
from .checkpoints.digest import weights_digest
from .checkpoints.load import load_model
from .checkpoints.save import save_model
from .data.texts import mixture  # this import also enters the named texts that load_calibration knows
from .evaluation.evaluate import evaluate, evaluate_sweep
from .evaluation.perplexity import perplexity, perplexity_sweep
from .files import build_dir
from .plan import DropPlan, drop_order, plan_drop
from .prune import apply_plan, dropped
from .repro.paper import record_claim
from .repro.provenance import provenance
from .repro.store import Store
from .scoring import ImportanceScores, score
from .speed.geometry import kv_cache_bytes
from .speed.measure import compare_speed, measure_speed
from .speed.roofline import predict_speed
from .streaming.drop import drop_checkpoint
from .streaming.processes import score_distributed
from .streaming.score import score_checkpoint

__version__ = "0.1.0"
