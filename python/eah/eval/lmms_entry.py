"""What the entry point `lmms_eval.models` leads to; it does not import the model."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="eah_hf", simple_class_path="eah.eval.lmms.EahHf")
