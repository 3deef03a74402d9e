"""Plain English paragraphs, written for these tests, to measure a language model on."""

import random
from collections.abc import Sequence

import torch

PARAGRAPHS = (
    "The library at the end of our street opens at nine, but there is usually a small line in front of the door by half past "
    "eight. Most of the people who wait there are retired, and they come for the newspapers and for the warm room. On rainy "
    "days the line is longer. When the door finally opens, everybody walks to the same chair as the day before, and nobody "
    "speaks until the first cup of coffee is empty.",
    "My grandmother kept bees for more than forty years. She used to say that a hive tells you how it feels if you stop and "
    "listen before you lift the lid. A calm hive hums on one low note. A hive that has lost its queen sounds restless, and the "
    "bees run over the frames as if they were looking for something. In the autumn she took only half of the honey, because "
    "the bees needed the rest to live through the winter.",
    "When you plan a long walk in the mountains, start early and look at the weather twice. Storms build up in the afternoon, "
    "and a path that is easy when it is dry can become dangerous in a few minutes of heavy rain. Carry more water than you "
    "think you need, tell somebody where you are going, and turn around if you are tired. The top of the mountain will still "
    "be there next year.",
    "The first trains were slow and loud, and many people were afraid of them. Within a generation they had changed the way "
    "a whole country lived. Fresh milk and fish reached the cities in the morning, letters arrived on the next day, and towns "
    "had to agree on one time, because a timetable is of no use if every clock shows a different hour.",
)


def shuffled(text: str) -> str:
    """The words of a text in a random order, always the same one."""
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


def perplexity(folder: str, texts: Sequence[str], start_token: int) -> float:
    """exp of the mean loss in nats of a token, over all tokens of all texts. Each text is read alone, after `start_token`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
    )
    losses = []
    for text in texts:
        tokens = torch.tensor([[start_token, *tokenizer(text, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            logits = model(tokens).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())
