"""Write the demo's conversations: prompts of ours, answered by SmolLM2-135M-Instruct itself (`limbeck assets fetch demo` first).

    python scripts/write_demo_data.py            # about N minutes on two cores; writes src/limbeck/data/limbeck/demo-*.jsonl

Text that the teacher wrote is text on which it is good, so that imitating it is worth something. An answer is kept if the model ended it
itself, within the length limits, without repeating itself; a rejected prompt is tried again a few times. The split is by topic: no prompt
and no topic of the held-out rows is trained on. Deterministic for one seed, torch version and number of threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.cache import resolve_model

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parents[1] / "src" / "limbeck" / "data" / "limbeck"
NUM_TRAIN, NUM_HELDOUT = 256, 48
HELDOUT_EVERY = 6  # every sixth topic of a template is held out
MIN_ANSWER, MAX_ANSWER, MAX_TOTAL = 40, 110, 192  # tokens; the total includes the chat template's default system prompt
UNWANTED = ("as an ai", "smollm", "hugging face", "i'm sorry", "[your", "[name", "http")

TEMPLATES: dict[str, str] = {
    "Explain in two or three short sentences what {} is.": """
        gravity; a volcano; a rainbow; photosynthesis; electricity; a glacier; an earthquake; the water cycle; a desert; a magnet; a fossil;
        democracy; inflation; a budget; a library; a computer program; the internet; a battery; a solar panel; a telescope; a vaccine; a vitamin;
        a hurricane; an ecosystem; recycling; friendship; a metaphor; a recipe; an orchestra; a museum; a compass; a thermometer; evaporation""",
    "Why {}? Answer in two or three short sentences.": """
        do birds migrate; is sleep important; do leaves change color in autumn; do people keep pets; is it important to drink water;
        do we need to wash our hands; do children like to play; is reading good for the mind; do plants need sunlight; do people enjoy music;
        is teamwork useful; do bees visit flowers; should we protect forests; is breakfast useful; do cats purr; do we wear warm clothes in winter;
        is it good to learn a second language; do people travel; is honesty important; do dogs wag their tails; is exercise good for the heart;
        do farmers rotate their crops; should we save money; do people celebrate birthdays""",
    "Write a very short story of three or four sentences about {}.": """
        a boy who finds an old map; a cat that is afraid of mice; a girl who plants a magic seed; two friends who get lost in the woods;
        a robot that learns to paint; a dog that waits at the station; a baker who invents a new cake; a lighthouse keeper in a storm;
        a little fish that wants to see the moon; an old clock that starts to talk; a teacher on her first day at school; a lost umbrella;
        a farmer and a clever fox; a snowman who makes a friend; a pilot who flies over the sea; a shy boy who joins a choir;
        a grandmother and her secret garden; a mouse who lives in a library; a king who cannot sleep; a bird that learns to sing;
        a child who builds a kite; a fisherman and a talking whale; a tree that remembers everything; a violin found in an attic""",
    "Give me three short tips for {}.": """
        sleeping better; learning to cook; saving money; staying focused at work; making new friends; writing a good letter; keeping a room tidy;
        growing tomatoes; taking better photos; preparing for an exam; running a first race; speaking in public; caring for a houseplant;
        packing a suitcase; reading more books; cooking healthy meals; training a puppy; reducing stress; using less water at home;
        a job interview; riding a bike in traffic; hosting a dinner party; learning to draw; starting a small garden; planning a picnic""",
    "Describe {} in three short sentences.": """
        a beach at sunset; a busy market; a quiet forest; an old bookshop; a snowy mountain; a summer garden; a small village; a rainy street;
        a cozy kitchen; a train station in the morning; a starry night; a playground in spring; a lake in autumn; a crowded concert;
        a lazy cat; a farm at dawn; a castle on a hill; a bakery early in the day; a river after rain; an empty classroom; a harbor with fishing boats;
        a path through a field of sunflowers; a campfire with friends; an apple tree in bloom""",
    "What is the difference between {}? Answer briefly.": """
        a lake and an ocean; a city and a village; a novel and a poem; fruit and vegetables; weather and climate; a frog and a toad;
        a planet and a star; jam and jelly; a hobby and a job; a violin and a guitar; a butterfly and a moth; cotton and wool; a debit card and a credit card;
        coffee and tea; a lion and a tiger; a bus and a train; a letter and an email; needs and wants; a painting and a photograph; butter and margarine;
        a college and a high school; a hill and a mountain; a comedy and a tragedy; a mammal and a reptile""",
    "Write a short, friendly email of three or four sentences {}.": """
        to a neighbor to ask for help with the garden; to a teacher to ask for more time; to a friend to invite her to dinner;
        to a colleague to say thank you; to a landlord about a broken heater; to a customer to apologize for a delay; to a team to announce a meeting;
        to a cousin about a family party; to a coach to say that you are ill; to a shop to ask about opening hours; to a new employee to welcome him;
        to a friend to congratulate her on a new job; to a hotel to ask for a quiet room; to a manager to ask for a day off;
        to a club to ask how to join; to a librarian to ask about a lost book; to a classmate to share notes; to parents about a school trip;
        to a friend to say sorry for being late; to a doctor's office to change an appointment""",
    "What are the benefits of {}? Answer in two or three short sentences.": """
        walking every day; eating vegetables; learning to swim; keeping a diary; working in a team; public transport; planting trees;
        listening to music; playing chess; yoga; cooking at home; volunteering; a good night's sleep; solar energy; reading to children;
        having a garden; riding a bicycle; spending time in nature; drinking green tea; a regular schedule; learning history; having a pet;
        speaking two languages; laughing often""",
    "How do I {}? Answer in three short steps.": """
        make a cup of tea; boil an egg; plant a seed; clean a window; make a sandwich; wrap a gift; wash a car; iron a shirt; paint a wall;
        make lemonade; set a table; bake a potato; start a blog; choose a good book; fold a paper airplane; make a simple salad; clean a bicycle;
        pack a lunch; write a thank-you note; cook rice; organize a desk; make popcorn; build a sandcastle; brush a dog""",
    "Write a four-line poem about {}.": """
        the sea; the moon; a river; autumn leaves; a mother's love; the first snow; a morning in spring; an old friend; the wind; a sleeping child;
        a garden of roses; the night sky; a long road; hope; a rainy day; the mountains; a candle; a summer evening; home; a little bird""",
    "List five {} and say in a few words what each is good for.": """
        kitchen tools; garden tools; musical instruments; winter sports; fruits; school supplies; farm animals; spices; kinds of transport;
        things to take on a hike; board games; herbs; household chores; kinds of exercise; art supplies; items for a first-aid kit""",
}


@dataclass(frozen=True)
class Prompt:
    text: str
    is_heldout: bool


def prompts() -> list[Prompt]:
    """All prompts; templates alternate, so that any beginning of the list is a mixture."""
    by_template = []
    for template, topics in TEMPLATES.items():
        names = [" ".join(topic.split()) for topic in topics.split(";")]
        by_template.append([Prompt(template.format(name), i % HELDOUT_EVERY == HELDOUT_EVERY - 1) for i, name in enumerate(names)])
    longest = max(map(len, by_template))
    return [column[i] for i in range(longest) for column in by_template if i < len(column)]


def repeats_itself(text: str) -> bool:
    """Whether four words come three times, or a sentence or line twice."""
    words = text.lower().split()
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    sentences = Counter(part.strip().lower() for line in text.splitlines() for part in line.split(". ") if len(part.split()) > 3)
    return max(fours.values(), default=0) >= 3 or max(sentences.values(), default=0) >= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=4, help="tries per prompt")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    folder = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers: dict[str, str] = {}
    started = time.monotonic()
    for attempt in range(options.rounds):
        todo = [prompt.text for prompt in prompts() if prompt.text not in answers]
        for first in range(0, len(todo), options.batch_size):
            batch = todo[first : first + options.batch_size]
            for text, answer in zip(batch, answer_all(model, tokenizer, batch, options.temperature), strict=True):
                if answer is not None:
                    answers[text] = answer
            print(f"try {attempt + 1}: {len(answers)} of {len(prompts())} kept, {time.monotonic() - started:.0f} s", flush=True)

    for name, is_heldout, num_rows in (("demo-train", False, NUM_TRAIN), ("demo-heldout", True, NUM_HELDOUT)):
        kept = [prompt.text for prompt in prompts() if prompt.is_heldout == is_heldout and prompt.text in answers][:num_rows]
        options.folder.mkdir(parents=True, exist_ok=True)
        with (options.folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for text in kept:
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answers[text]}]
                stream.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
        print(f"{name}: {len(kept)} rows")


@torch.inference_mode()
def answer_all(model: torch.nn.Module, tokenizer: object, texts: list[str], temperature: float) -> list[str | None]:
    """One sampled answer per prompt; None where it is not to be kept."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=MAX_ANSWER + 1, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    answers: list[str | None] = []
    for chat, ids in zip(chats, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        num_tokens = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        answer = tokenizer.decode(ids[:num_tokens])
        rendered = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": answer}], return_dict=False)
        is_good = (
            MIN_ANSWER <= num_tokens <= MAX_ANSWER
            and len(rendered) <= MAX_TOTAL
            and answer == answer.strip()
            and not repeats_itself(answer)
            and not any(word in answer.lower() for word in UNWANTED)
        )
        answers.append(answer if is_good else None)
    return answers


if __name__ == "__main__":
    main()
