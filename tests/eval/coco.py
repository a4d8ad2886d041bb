"""A folder such as COCO's annotations, of a few images."""

import json

SYNONYMS = """\
person, man, child, people
motorcycle,  motor bike, motorbike, scooter
dog, puppy
bear, panda
train, locomotive
tie, bow tie
wine glass
cake,  cheesecake, pancake
chair, seat, stool
toilet, potty
cell phone, phone, iPhone
knife, knive
mouse
bird, goose
cow, bison \n"""
CATEGORIES = (
    "person",
    "motorcycle",
    "dog",
    "bear",
    "train",
    "tie",
    "wine glass",
    "cake",
    "chair",
    "toilet",
    "cell phone",
)


def write(folder, truth, captions=(), split="val2014", first=1):
    """truth: the categories of each image; captions: (image, text)."""
    numbers = {name: number for number, name in enumerate(CATEGORIES, 1)}
    images = [{"id": n, "file_name": f"COCO_{split}_{n:012}.jpg"} for n, _ in enumerate(truth, first)]
    instances = {
        "images": images,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
        "annotations": [
            {"image_id": n, "category_id": numbers[name]} for n, names in enumerate(truth, first) for name in names
        ],
    }
    captions = {"images": images, "annotations": [{"image_id": n, "caption": text} for n, text in captions]}
    (folder / f"instances_{split}.json").write_text(json.dumps(instances))
    (folder / f"captions_{split}.json").write_text(json.dumps(captions))
    (folder / "synonyms.txt").write_text(SYNONYMS)
    return folder
