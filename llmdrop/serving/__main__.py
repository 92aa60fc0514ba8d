"""`python -m llmdrop.serving model.gguf --port 8080`: an OpenAI-compatible server on one GGUF."""

from .llama_cpp import main

if __name__ == "__main__":
    main()
