"""lm-eval's own command line, all of its flags included, with the model "llmdrop" added (see `DroppedLM`).

    python -m llmdrop.evaluation run --model llmdrop --model_args pretrained=smollm2-135m,drop_attn=8 --tasks piqa

lm-eval has no plug-ins: the plain `lm_eval` command cannot know the model.
"""

from ..checkpoints.extras import import_extra

if __name__ == "__main__":
    command_line = import_extra("lm_eval.__main__", "eval")
    from . import lm_eval_models  # noqa: F401 (importing it registers the model)

    command_line.cli_evaluate()
