"""lm-eval's own command line, all of its flags included, with the model "llmdrop" added (see `DroppedLM`).

    python -m llmdrop.evaluation run --model llmdrop --model_args pretrained=smollm2-135m,drop_attn=8 --tasks piqa

lm-eval has no plug-ins: the plain `lm_eval` command cannot know the model.
"""

from lm_eval.__main__ import cli_evaluate

from . import lm_eval_models  # noqa: F401 (importing it registers the model)

if __name__ == "__main__":
    cli_evaluate()
