"""The page on which photos are restored in a browser, `r2r web`; needs Gradio, the extra `[web]`."""

import os

# Read by Gradio and huggingface_hub when they are imported, which the modules of this package do.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
