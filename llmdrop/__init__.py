"""llmdrop: which layers of a language model can you throw away, and what do you get for it?"""

from .anatomy import anatomy
from .calibration import Calibration, load_calibration
from .evaluate import evaluate, evaluate_sweep
from .fingerprint import provenance
from .models import build_dir, load_model, save_model, weights_digest
from .paper import record_claim
from .plan import DropPlan, drop_order, plan_drop
from .prune import apply_plan, dropped
from .results import Store
from .roofline import predict_speed
from .scoring import ImportanceScores, score
from .slim import drop_checkpoint
from .speed import compare_speed, kv_cache_bytes, measure_speed
from .stream import score_checkpoint
from .sweep import perplexity, perplexity_sweep

__version__ = "0.1.0"
