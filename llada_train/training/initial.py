"""What `init_from` names, looked at before anything starts. Imports torch only for a Hugging Face folder."""

from llada_train.checkpoint.manifest import TOKENIZER, ImportedManifest, read_any_manifest
from llada_train.checkpoint.store import FOLDER, is_hf_folder, newest_manifest, resolve
from llada_train.config.errors import UserError, under_key
from llada_train.config.load import model_differences
from llada_train.config.schema import Config
from llada_train.data.tokenizer import Tokenizer


def check_initial_weights(config: Config) -> None:
    """Initial weights have to be of the config's model, and mean the same ids by mask and end of text.

    A run that has checkpoints no longer needs them. Headers and manifests are read, no tensors, and no data: before a
    large data set is tokenized, this is known.

    Raises:
        UserError: they do not fit, or are not whole; all of it is listed.
    """
    path, model = config.init_from, config.model
    if path is None or newest_manifest(config.run_dir / FOLDER) is not None:
        return
    with under_key("data.tokenizer"):
        ours = Tokenizer.load(config.data.tokenizer)
    with under_key("init_from"):
        if is_hf_folder(path):
            from llada_train.convert.from_hf import HfWeights

            HfWeights(path, model, ours).close()
            return
        folder = resolve(path)
        manifest = read_any_manifest(folder)
    lines = [f"model.{line}" for line in model_differences(manifest.model, model)]
    if isinstance(manifest, ImportedManifest):
        theirs = Tokenizer.load(folder / TOKENIZER)
        ids = {"mask": (theirs.mask_id, ours.mask_id), "end-of-text": (theirs.eos_id, ours.eos_id)}
        lines += [f"the tokenizer's {name} id: {then} → {now}" for name, (then, now) in ids.items() if then != now]
    if lines:
        heading = f"init_from: {path}: its weights are not what the config asks for (stored there → given now):"
        raise UserError("\n  ".join([heading, *lines]))
