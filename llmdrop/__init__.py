"""llmdrop: which layers of a language model can you throw away, and what do you get for it?"""

from .anatomy import anatomy
from .models import build_dir, load_model, save_model, weights_digest
from .plan import DropPlan, drop_order, plan_drop
from .prune import apply_plan, dropped
from .scoring import ImportanceScores, score

__version__ = "0.1.0"
