"""Whether the Hugging Face Hub has something, asked once: downloads are tried again for half a minute."""

from __future__ import annotations

SECONDS = 10
"""How long the Hub may take to answer."""


def refusal(hub_id: str, file_name: str, revision: str | None = None) -> str | None:
    """Why a file of a repository cannot be had; None if it may be, from the cache of downloads or the Hub.

    Needs huggingface_hub.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(hub_id, file_name, revision=revision), str):
            return None
        huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=SECONDS)
    except HFValidationError:
        return "no Hub id looks so"
    except RepositoryNotFoundError:
        return "the Hub has none of that id that you may read (a private one needs `hf auth login`)"
    except HfHubHTTPError:
        return None  # a mirror may answer this question otherwise; a download tells
    except Exception as error:  # of whichever library makes the connection
        return f"it has not been downloaded before, and the Hub cannot be reached ({type(error).__name__})"
    return None


__all__ = ["refusal"]
