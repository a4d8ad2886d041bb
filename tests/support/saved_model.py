"""A model in a folder, as a user's would be, and a picture."""

from pathlib import Path

from eah.cli import samples


def save_small_llava(folder: Path, picture: str) -> tuple[Path, Path]:
    """The demo's model and processor, and its photograph, small, in a file of that name: the folder and the file."""
    processor, model = samples.small_llava()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    samples.load_picture(None)[0].resize((60, 80)).save(folder / picture)
    return folder, folder / picture
