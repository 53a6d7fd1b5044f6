"""What the base model learns to draw: names that are drawn clearly and unlike each other at 64 pixels, in three styles."""

from __future__ import annotations

from tools.make_example_dataset import caption_of

STYLES = {"3d": "fluent3d", "noto": "noto", "twemoji": "twemoji"}  # word of the caption -> folder of images
AUTOENCODER_STYLES = ("fluent3d", "noto", "twemoji", "fluentcolor", "notov1")  # fluenthc and fluentflat are left to LoRAs

_ANIMALS = """
    monkey face, gorilla, dog face, poodle, fox, cat face, lion, tiger face, leopard, horse face, unicorn, pig face, elephant,
    rhinoceros, mouse, hamster, rabbit face, bat, bear, koala, panda, turkey, hatching chick, penguin, duck, owl, frog, crocodile,
    turtle, snake, spouting whale, dolphin, tropical fish, blowfish, octopus, spiral shell, crab, butterfly, honeybee, lady
    beetle, bouquet, rose, hibiscus, sunflower, tulip, evergreen tree, cactus, maple leaf, mushroom
"""
_FOOD = """
    grapes, melon, watermelon, tangerine, lemon, banana, pineapple, red apple, pear, peach, cherries, strawberry, tomato, avocado,
    eggplant, carrot, cucumber, croissant, baguette bread, pancakes, cheese wedge, bacon, hamburger, french fries, pizza, hot dog,
    taco, egg, green salad, popcorn, rice ball, spaghetti, sushi, fried shrimp, shaved ice, ice cream, doughnut, cookie,
    birthday cake, chocolate bar, lollipop, honey pot, wine glass, cocktail glass, beer mug, kitchen knife
"""
_OBJECTS = """
    glasses, sunglasses, jeans, dress, backpack, crown, top hat, ring, gem stone, megaphone, bell, microphone, trumpet, guitar,
    violin, drum, mobile phone, telephone, laptop, floppy disk, television, camera, candle, light bulb, open book, books,
    envelope, postbox, briefcase, scissors, key, bomb, bed, shopping cart
"""
_TRAVEL = """
    volcano, mount fuji, house, school, castle, mosque, fountain, tent, roller coaster, locomotive, ambulance, police car, taxi,
    automobile, motorcycle, bicycle, anchor, sailboat, speedboat, ship, helicopter, satellite, rocket, alarm clock, crescent moon,
    sun, star, cloud, rainbow, umbrella, snowman, comet
"""


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


NAMES = {
    "Animals & Nature": _listed(_ANIMALS),
    "Food & Drink": _listed(_FOOD),
    "Objects": _listed(_OBJECTS),
    "Travel & Places": _listed(_TRAVEL),
}


def prompt_of(style: str, name: str) -> str:
    """What one asks the base model for.

    >>> prompt_of("3d", "hot dog")
    'a 3d emoji of a hot dog'
    """
    return caption_of(name, style)
