"""Short English sentences about feelings, which the default model is pre-trained on.

A small grammar, drawn from with a seed. About one sentence in four of those that continue a prompt of the recipe has
one of its target words (happy, glad, good, great, smile, joy, love); the rest are other feelings, good and bad. The
tails (reasons, times, places) give several thousand continuations, so that a collapse would show.
"""

import random

ADJECTIVES = (
    "tired sad angry lonely bored nervous afraid anxious cold hungry confused worried lost empty weak sick upset "
    "guilty ashamed jealous bitter gloomy restless sleepy helpless hopeless miserable annoyed frustrated "
    "disappointed embarrassed awkward dizzy fragile tense uneasy numb shy small stupid strange slow heavy busy "
    "calm proud curious hopeful brave surprised relaxed thankful excited peaceful warm strong lucky safe free "
    "patient quiet certain different alive awake ready silly serious careful clumsy stubborn"
).split()
TARGET_ADJECTIVES = "happy glad good great".split()
TARGET_SHARE = 0.22  # of the adjectives, feelings and reactions that are drawn
FEELINGS = "pain anger hope fear shame pride doubt worry relief guilt sorrow envy".split()
TARGET_FEELINGS = "joy love".split()
REACTIONS = "cry laugh sigh worry wonder shiver think blush frown wait tremble sing dance yawn complain".split()
THINGS = (
    "garden letter kitchen weather river music dinner train journey house window market story picture song bridge "
    "winter summer morning evening party exam meeting game book film road village city lake forest mountain storm "
    "birthday holiday news plan work answer question promise mistake secret silence noise"
).split()
PEOPLE = (
    "my mother|my father|my sister|my brother|my friend|the teacher|the doctor|the neighbour|the children|my aunt|"
    "the baker|the farmer|my cousin|the old man|the young woman|everybody|nobody"
).split("|")
DEEDS = (
    "called me|went home|forgot my name|lost the key|found the dog|told a story|left the room|came back|sat down|"
    "opened the door|wrote a letter|made some tea|fixed the car|missed the bus|won the game|broke the cup|"
    "looked at me|asked a question|stayed at home|said nothing"
).split("|")
TIMES = (
    "today|tonight|this morning|this evening|again|now|these days|after lunch|before the exam|in the winter|at night|"
    "on Sunday|on Monday|all day|for a while|at last|once more|every day"
).split("|")
PLACES = "at home|in the city|near the river|by the window|on the train|in the kitchen|at school|in the garden".split(
    "|"
)
ENDINGS = ". . . . . ! !".split()


def _adjective(rng: random.Random) -> str:
    return rng.choice(TARGET_ADJECTIVES if rng.random() < TARGET_SHARE else ADJECTIVES)


def _feeling(rng: random.Random) -> str:
    return rng.choice(TARGET_FEELINGS if rng.random() < TARGET_SHARE else FEELINGS)


def _tail(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return f" about the {rng.choice(THINGS)}" + (f" {rng.choice(TIMES)}" if rng.random() < 0.4 else "")
    if kind < 0.5:
        return f" because {rng.choice(PEOPLE)} {rng.choice(DEEDS)}"
    if kind < 0.65:
        return f" when {rng.choice(PEOPLE)} {rng.choice(DEEDS)}"
    if kind < 0.8:
        return f" {rng.choice(TIMES)}" + (f" {rng.choice(PLACES)}" if rng.random() < 0.3 else "")
    if kind < 0.92:
        return f" and {_adjective(rng)}" + (f" {rng.choice(TIMES)}" if rng.random() < 0.6 else "")
    return ""


def _middle(rng: random.Random, opening: str) -> str:
    kind = rng.random()
    if opening == "I feel so":
        return f"much {_feeling(rng)}" if kind < 0.15 else _adjective(rng)
    if opening == "This makes me":
        if kind < 0.25:
            return "smile" if rng.random() < TARGET_SHARE else rng.choice(REACTIONS)
        return f"{'feel ' if kind < 0.5 else 'so ' if kind < 0.6 else ''}{_adjective(rng)}"
    if kind < 0.08:
        return f"full of {_feeling(rng)}"
    return f"{'not ' if kind < 0.16 else 'very ' if kind < 0.2 else ''}{_adjective(rng)}"


def sentence(rng: random.Random) -> str:
    """One sentence: two in three continue a prompt of the recipe, the others tell of somebody else."""
    if rng.random() < 0.67:
        opening = rng.choice(("I feel so", "This makes me", "I am really"))
        return f"{opening} {_middle(rng, opening)}{_tail(rng)}{rng.choice(ENDINGS)}"
    person = rng.choice(PEOPLE)
    verb = rng.choice(("was", "felt", "looked", "seemed"))
    return f"{person[0].upper()}{person[1:]} {verb} {_adjective(rng)}{_tail(rng)}{rng.choice(ENDINGS)}"


def sentences(count: int, seed: int) -> list[str]:
    """`count` sentences, the same for the same seed."""
    rng = random.Random(seed)
    return [sentence(rng) for _ in range(count)]
