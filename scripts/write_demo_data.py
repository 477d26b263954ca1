"""Write the demo's conversations: prompts of ours, answered by SmolLM2-135M-Instruct itself (`limbeck assets fetch demo` first).

    OMP_NUM_THREADS=1 python scripts/write_demo_data.py    # about 11 CPU-minutes; writes src/limbeck/data/limbeck/demo-*.jsonl

Text that the teacher wrote is text on which it is good, so that imitating it is worth something. An answer is kept if the model ended it
itself, within the length limits, without repeating itself; a rejected prompt is tried again. Every sixth topic of each template is held
out, so no held-out prompt is trained on. Deterministic for one seed, torch version and number of threads.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.cache import resolve_model

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parents[1] / "src" / "limbeck" / "data" / "limbeck"
NUM_TRAIN, NUM_HELDOUT = 256, 48
HELDOUT_EVERY = 6  # every sixth topic of a template is held out
MIN_ANSWER, MAX_ANSWER, MAX_TOTAL = 40, 110, 192  # tokens; the total includes the chat template's default system prompt

SHORT = "Answer in one short paragraph."
TEMPLATES: dict[str, str] = {
    f"What is {{}}? {SHORT}": """
        gravity; a volcano; a rainbow; photosynthesis; electricity; a glacier; an earthquake; the water cycle; a desert; a magnet; a
        fossil; democracy; inflation; a budget; a library; a computer; the internet; a battery; a solar panel; a telescope; a
        vaccine; a vitamin; a hurricane; an ecosystem; recycling; friendship; a metaphor; a recipe; an orchestra; a museum; a
        compass; a thermometer; evaporation; a planet; an atom; a cell; a bank loan; a contract; a dictionary; a lighthouse; a
        rainforest; a coral reef; a tide; an eclipse; a novel; a haiku; jazz; ballet; architecture; sculpture""",
    f"Why {{}}? {SHORT}": """
        do birds migrate; is sleep important; do leaves change color in autumn; do people keep pets; is it important to drink water;
        do we wash our hands; do children like to play; is reading good for the mind; do plants need sunlight; do people enjoy
        music; is teamwork useful; do bees visit flowers; should we protect forests; is breakfast useful; do cats purr; do we wear
        warm clothes in winter; is it good to learn a second language; do people travel; is honesty important; do dogs wag their
        tails; is exercise good for the heart; do farmers rotate their crops; should we save money; do people celebrate birthdays;
        is the sky blue; is the sea salty; is laughter healthy; do people drink coffee; is patience a virtue; do we dream; do wolves
        live in packs; is a good teacher important; do people write letters; is clean air important; do bears sleep in winter; do
        people plant gardens""",
    f"What are the benefits of {{}}? {SHORT}": """
        walking every day; eating vegetables; learning to swim; keeping a diary; working in a team; public transport; planting
        trees; listening to music; playing chess; yoga; cooking at home; volunteering; a good night's sleep; solar energy; reading
        to children; having a garden; riding a bicycle; spending time in nature; drinking green tea; a regular schedule; learning
        history; having a pet; speaking two languages; laughing often; meditation; dancing; eating fruit; studying abroad;
        stretching; growing your own food""",
    f"Describe {{}}. {SHORT}": """
        a beach at sunset; a busy market; a quiet forest; an old bookshop; a snowy mountain; a summer garden; a small village; a
        rainy street; a cozy kitchen; a train station in the morning; a starry night; a playground in spring; a lake in autumn; a
        crowded concert; a lazy cat; a farm at dawn; a castle on a hill; a bakery early in the day; a river after rain; an empty
        classroom; a fishing harbor; a field of sunflowers; a campfire with friends; an apple tree in bloom; a city at night; a
        stormy sea; a grandfather's workshop; a wooden bridge; a waterfall; a circus""",
    f"What does {{}} do? {SHORT}": """
        a doctor; a teacher; a farmer; a carpenter; a pilot; a nurse; a librarian; a chef; a lawyer; an engineer; a firefighter; a
        gardener; a photographer; a journalist; a baker; a plumber; an architect; a scientist; a judge; a mechanic; a coach; a
        musician; a dentist; a tailor; a translator; a veterinarian; a police officer; a cashier; a painter; an electrician""",
    f"How does {{}} work? {SHORT}": """
        a refrigerator; a bicycle; a wind turbine; a camera; a clock; a microwave oven; a lock and key; a steam engine; a toaster; a
        hot air balloon; an elevator; a sailing boat; a light bulb; a piano; a vacuum cleaner; a parachute; a pencil; a washing
        machine; an umbrella; a radio; a windmill; a printer; a pair of glasses; a greenhouse""",
    f"What is the difference between {{}}? {SHORT}": """
        a lake and an ocean; a city and a village; a novel and a poem; fruit and vegetables; weather and climate; a frog and a toad;
        a planet and a star; jam and jelly; a hobby and a job; a violin and a guitar; a butterfly and a moth; cotton and wool;
        coffee and tea; a lion and a tiger; a bus and a train; a letter and an email; needs and wants; a painting and a photograph;
        a hill and a mountain; a comedy and a tragedy; bread and cake; summer and winter; a boat and a ship; knowledge and wisdom""",
    f"What makes {{}}? {SHORT}": """
        a good friend; a good leader; a great story; a healthy meal; a strong team; a happy home; a good teacher; a good night's
        rest; a safe city; a beautiful garden; a good book; a fair game; a good listener; a successful business; a great holiday; a
        good neighbor; a good song; a perfect picnic; a good speech; a warm welcome; a good parent; a great city; a good movie; a
        good cup of coffee""",
    f"How can I {{}}? {SHORT}": """
        sleep better; save money; learn to cook; make new friends; stay focused at work; keep a room tidy; grow tomatoes; take
        better photos; prepare for an exam; become a better runner; speak in public; care for a houseplant; read more books; train a
        puppy; reduce stress; use less water at home; learn to draw; start a small garden; plan a picnic; eat less sugar; wake up
        early; remember names; write a good letter; be more patient; learn to play the guitar; help my community; be kinder to
        myself; choose a gift""",
    f"What do people do {{}}? {SHORT}": """
        at a wedding; in a library; at a beach; on a farm; at a festival; in a park; at a birthday party; in a gym; at a market; at
        a museum; in the mountains; on a long train ride; at a school; in a kitchen; at an airport; on a rainy day; at a bank; in a
        hospital; at a campsite; in a theater""",
    f"What is {{}} used for? {SHORT}": """
        a hammer; salt; a ladder; a microscope; vinegar; a map; soap; a calendar; a whistle; olive oil; a magnifying glass; a broom;
        yeast; a rope; a notebook; sugar; a spreadsheet; a tent; wool; aluminum; a blender; a ruler; baking soda; a backpack""",
    f"How is {{}} made? {SHORT}": """
        bread; cheese; paper; glass; chocolate; soap; wine; butter; a candle; yogurt; steel; a pizza; a sweater; a movie; maple
        syrup; a brick; ice cream; orange juice; a quilt; pasta""",
    "Write one short paragraph about {}.": """
        elephants; dolphins; owls; horses; penguins; butterflies; whales; turtles; eagles; bears; cats; dogs; goats; frogs; swans;
        mountains; rivers; stars; clouds; coffee; wheat; rubber; trains; kites; Spain; Canada; Australia; foxes; rabbits; squirrels;
        parrots; sheep; spiders; ants; the sun; the moon; the ocean; rain; snow; rice; apples; honey; cotton; gold; violins;
        bicycles; London; Paris; Egypt; Japan; India; Brazil; the Arctic; Africa""",
}
UNWANTED = re.compile(r"as an ai|smollm|hugging face|i'm sorry|http|\*\*|\[|\d{3}", re.IGNORECASE)


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
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="tries per prompt")
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
def answer_all(model: Any, tokenizer: Any, texts: list[str], temperature: float) -> list[str | None]:
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
            and answer.endswith((".", "!"))
            and not repeats_itself(answer)
            and not UNWANTED.search(answer)
        )
        answers.append(answer if is_good else None)
    return answers


if __name__ == "__main__":
    main()
