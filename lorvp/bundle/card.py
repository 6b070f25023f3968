"""Write a bundle's model card: what it is, its data, protocol, accuracy and licence."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lorvp.config import TrialConfig

SELECTION = {
    "val": "the best epoch on validation images, which were not trained on; the test set was read once, with that "
    "epoch's prompt and head",
    "last": "nothing: it is the last epoch, and was trained on the validation images, too, whose figure is no measure; "
    "the test set was read once",
    "test": "the published protocol: trained on every image, and the best epoch on the test set itself, whose figures "
    "stand for validation, too; an optimistic figure",
    "test_best_epoch": "the published protocol: the best epoch on the test set itself, an optimistic figure",
}
TEXT = """\
# {name}

{what}

## Data and protocol

Tuned on {dataset} ({classes} classes) for {epochs} epochs. Selected by {selection}.

## Figures

| | top-1 % | top-5 % |
|---|---|---|
| validation | {val_top1} | {val_top5} |
| test | {test_top1} | {test_top5} |

One trial, {trial}, chosen among those of its sweep by the validation figure, which is optimistic by that.

## Use

    import lorvp
    model = lorvp.load("FOLDER")    # uint8 or float images (N, 3, H, W) of any size in, logits (N, classes) out
    model.class_names

    python -m lorvp.predict FOLDER photo.jpg

Only what was tuned is in the folder: the backbone's weights come from timm, and must be those of digest `{digest}`.

## Licence

Backbone: {licence}. Data: see {dataset}. What is in this folder: for its owner to say, in `license` above.
"""


def card(description: dict[str, Any]) -> str:
    """Write the model card of a bundle's description: Markdown with Hugging Face hub metadata at its head."""
    config = TrialConfig.model_validate(description["config"])
    metrics, classes, source = description["metrics"], description["class_names"], description["source"]
    licence = source["licence"] or "unknown"
    name = f"{config.method} of {config.backbone.name} for {config.dataset.title}"
    splits = [split for split in ("val", "test") if metrics[f"{split}_top1"] is not None]
    data = ModelCardData(
        library_name="lorvp",
        license=licence,
        base_model=source["hub_id"],
        pipeline_tag="image-classification",
        tags=["visual-prompting", config.method, config.head.kind],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=config.dataset.title,
                dataset_name=config.dataset.title,
                dataset_split=split,
                metric_type="accuracy",
                metric_value=round(metrics[f"{split}_top1"] / 100, 6),
            )
            for split in splits
        ],
    )
    metric_texts = {
        f"{split}_{top}": "-" if (value := metrics[f"{split}_{top}"]) is None else f"{value:.2f}"
        for split in ("val", "test")
        for top in ("top1", "top5")
    }
    text = TEXT.format(
        name=name,
        what=_describe_model(config),
        dataset=config.dataset.title,
        classes=len(classes),
        epochs=metrics["epochs_trained"],
        selection=selection(config),
        trial=description["trial"],
        digest=source["digest"],
        licence=licence,
        **metric_texts,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def selection(config: TrialConfig) -> str:
    """Describe in words how the epoch was chosen."""
    if not config.dataset.holds_back:
        return SELECTION["test"]
    return SELECTION["last" if config.select == "val" and config.dataset.train_on_val else config.select]


def _describe_model(config: TrialConfig) -> str:
    trained = "its weights trained" if config.trains_backbone else "frozen"
    prompt = f", a prompt of rank {config.rank}" if config.rank else ""
    several = f" of {config.head.picks} source classes a class" if config.head.picks > 1 else ""
    return f"`{config.backbone.name}`, {trained}{prompt}, label mapping {config.head.kind}{several}."
