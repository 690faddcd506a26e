"""Everyday facts of ten kinds noted between the sentences of real prose, for models that read plain English."""

from __future__ import annotations

import random

from keepkv.tasks.base import Count, Item, Question, Task, weave

PEOPLE = (
    "Anna", "Boris", "Carla", "Daniel", "Elena", "Frank", "Greta", "Henry", "Irene", "Jacob", "Karen", "Louis",
    "Maria", "Nathan", "Olivia", "Peter", "Rachel", "Simon", "Teresa", "Victor",
)  # fmt: skip
CITIES = (
    "Lisbon", "Vienna", "Oslo", "Toronto", "Cairo", "Madrid", "Sydney", "Dublin", "Warsaw", "Chicago", "Berlin",
    "Athens", "Prague", "Boston", "Lima", "Seoul",
)  # fmt: skip
THINGS = ("camera", "piano", "bicycle", "lamp", "tent", "clock", "sofa", "printer", "guitar", "carpet")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple", "orange", "grey")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FOODS = ("peanuts", "eggs", "milk", "fish", "soy", "wheat", "honey", "garlic", "strawberries", "mushrooms")
JOBS = ("baker", "lawyer", "nurse", "pilot", "teacher", "farmer", "plumber", "judge", "carpenter", "dentist")
PLACES = ("garage", "kitchen", "attic", "cellar", "garden", "bedroom", "office", "shed", "hall", "bathroom")
DOGS = ("Rex", "Luna", "Max", "Bella", "Rocky", "Daisy", "Oscar", "Molly", "Buddy", "Coco")
CONTENTS = ("letters", "coins", "buttons", "candles", "maps", "stamps", "spoons", "shells", "toys", "keys")
PRICES = tuple(str(price) for price in range(21, 99, 4))

# What is noted, what is asked, whom it is about, and what the answer may be.
KINDS = (
    (" The meeting with {} is on {}.", "On which day is the meeting with {}?", PEOPLE, DAYS),
    (" The spare key of {} is in the {}.", "In which place is the spare key of {}?", PEOPLE, PLACES),
    (" The parents of {} live in {}.", "In which city do the parents of {} live?", PEOPLE, CITIES),
    (" The {} costs {} euros.", "How many euros does the {} cost?", THINGS, PRICES),
    (" The doctor says that {} must not eat {}.", "What must {} not eat?", PEOPLE, FOODS),
    (" Since last year {} has worked as a {}.", "What is the job of {}?", PEOPLE, JOBS),
    (" The {} box is full of {}.", "What is the {} box full of?", COLOURS, CONTENTS),
    (" The dog of {} is called {}.", "What is the name of the dog of {}?", PEOPLE, DOGS),
    (" The favourite colour of {} is {}.", "What is the favourite colour of {}?", PEOPLE, COLOURS),
    (" The train to {} leaves on {}.", "On which day does the train to {} leave?", CITIES, DAYS),
)


def notes(rng: random.Random, count: Count, length: int, *, alike: int = 2, questions: int = 8) -> Item:
    """``alike`` facts of each kind, about different ones, and ``questions`` on facts of as many kinds. Of fewer kinds
    where the context has no room for all ten."""
    facts: list[str] = []
    asked: list[Question] = []
    for said, question, subjects, answers in rng.sample(KINDS, len(KINDS)):
        about, known = rng.sample(subjects, alike), rng.sample(answers, alike)
        more = [said.format(*pair) for pair in zip(about, known, strict=True)]
        if facts and sum(map(count, facts + more)) > length:
            break
        facts += more
        asked.append(Question("\n" + question.format(about[0]), f" {known[0]}", values=(known[0],)))
    return Item(weave(rng, count, length, facts), tuple(asked[:questions]))


TASK = Task("notes", "everyday facts of ten kinds between sentences of real text", notes, "Answer with one word.")
