"""The drafter that goes through text: byte-level, character, word-piece and sentence-piece-like tokenizers in pairs.

Two kinds of draft model: a *reader*, which knows the whole text and continues whatever part of it it is shown, so that
every right step ends in full acceptance; and tiny random llamas, which write nonsense and broken bytes.
"""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from accel.drafters.base import Ask, Drafter
from accel.drafters.translated import NUM_HELD, TranslatedDrafter
from accel.errors import AccelError, IncompatibleError

TEXT = (
    "Once upon a time a small café stood by the harbour, and its owner knew every sailor by name. "
    "Naïve visitors asked for the menu 🙂 and were told that there was none 🙂🙃. "
    "The soup was whatever the boats had brought; the bread was what Zoë had baked, and nobody ever complained.\n"
    "In winter, when the boats stayed in, there was cabbage — and then they complained."
)
CORPUS = [TEXT, "the cat sat on the mat while the other cat stood there and complained ever so naïvely"] * 3
END = "<end>"


def wrapped(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def byte_level(size, add_prefix_space=False):
    """Byte-level BPE as GPT-2's; 257 ids are one a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


def pieces(size):
    """BPE as Llama 2's: a space is put in front of every text, characters that have no token fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["".join(c for c in text if ord(c) < 128) for text in CORPUS], trainer)
    # the trainer knows no other way to name the bytes, but they are text
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return wrapped(Tokenizer.from_str(json.dumps(state)))


def letters():
    """One id a character of the corpus, nothing for any other."""
    alphabet = sorted(set("".join(CORPUS)))
    tokenizer = Tokenizer(models.BPE(vocab={END: 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer)


def words():
    """One id a word, spaces thrown away: a tokenizer that cannot give its text back."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=[END, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrapped(tokenizer)


TARGET = byte_level(420)
TOKENIZERS = {
    "bytes": byte_level(257),
    "short": byte_level(300),
    "long": byte_level(600),
    "same": TARGET,
    "prefixed": byte_level(350, add_prefix_space=True),
    "letters": letters(),
    "pieces": pieces(520),
}


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Reader(LlamaForCausalLM):
    """Continues its own tokens of a known text; says ``<end>`` where it is shown anything else.

    Its keys are its tokens (ids + 1), so what it sees is what the cache holds for the row and nothing else.
    """

    def __init__(self, tokenizer, text):
        super().__init__(config_of(len(tokenizer), model_type="reader"))
        self.tokenizer = tokenizer
        self.text = text
        self.fed = []
        self.belief = 0.9
        letter = encode(tokenizer, "t")
        behind = len(decode(tokenizer, letter))
        # by text, so that of two ways to write a letter a byte, which comes first, is not the one
        surfaces = {decode(tokenizer, [*letter, t])[behind:]: t for t in range(1, len(tokenizer))}
        self.surfaces = {t: surface for surface, t in surfaces.items() if surface and "\ufffd" not in surface}

    def forward(self, input_ids, past_key_values, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        n = input_ids.shape[1]
        self.fed.append(input_ids.numel())
        keys, _ = past_key_values.update(*[(input_ids + 1).double()[:, None, :, None]] * 2, 0)
        places = range(n)[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits_to_keep.tolist()
        logits = torch.zeros(len(input_ids), len(places), self.config.vocab_size)
        for row, seen in enumerate(keys[:, 0, :, 0].long().tolist()):
            for column, place in enumerate(places):
                context = [token - 1 for token in seen[: len(seen) - n + place + 1] if token > 0]
                logits[row, column] = self.log_belief(self.next_token(context))
        return CausalLMOutputWithPast(logits=logits)

    def next_token(self, context):
        """The canonical next token where the context is canonical, else the longest that goes on with the text."""
        end = self.tokenizer.eos_token_id
        whole = encode(self.tokenizer, self.text)
        if whole[: len(context)] == context:
            return [*whole, end][len(context)]
        # tokens at the end that are some bytes of a character
        begun = next(i for i in range(5) if not decode(self.tokenizer, context[: len(context) - i]).endswith("\ufffd"))
        said = decode(self.tokenizer, context[: len(context) - begun])
        if not self.text.startswith(said):
            # the space that some tokenizers put in front of every text
            said = said[1:]
        if not self.text.startswith(said) or said == self.text:
            return end
        rest = self.text[len(said) :]
        whole_tokens = [token for token, surface in self.surfaces.items() if rest.startswith(surface)]
        if whole_tokens and not begun:
            return max(whole_tokens, key=lambda token: len(self.surfaces[token]))
        return encode(self.tokenizer, "t" + rest[0])[len(encode(self.tokenizer, "t")) :][begun]

    def log_belief(self, token):
        size = self.config.vocab_size
        probabilities = torch.full((size,), (1 - self.belief) / (size - 1))
        probabilities[token] = self.belief
        return probabilities.log()


def config_of(vocab_size, model_type="llama"):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    config.model_type = model_type
    return config


def random_llama(tokenizer, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config_of(len(tokenizer))).eval()


def reading(name, text=TEXT, target=TARGET):
    tokenizer = TOKENIZERS[name]
    return TranslatedDrafter(Reader(tokenizer, text), tokenizer, target, len(target))


def guessing(name, seed=0, target=TARGET):
    tokenizer = TOKENIZERS[name]
    return TranslatedDrafter(random_llama(tokenizer, seed), tokenizer, target, len(target))


def test_fulfils_the_protocol():
    drafter = guessing("short")
    assert isinstance(drafter, Drafter)
    assert (drafter.name, drafter.free) == ("translated-lm", False)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("target", ["bytes", "same", "long", "pieces"])
def test_a_draft_that_reads_the_same_text_is_accepted_in_full(name, target):
    """From many places in the text: all that is proposed is what the target's tokenizer makes of the text."""
    tokenizer = TOKENIZERS[target]
    drafter = reading(name, target=tokenizer)
    final = encode(tokenizer, TEXT)
    drafter.open(0, final[:9], seed=0)
    done, rounds, empty = 9, 0, 0
    while done < len(final) - 1:
        draft = drafter.propose([Ask(0, 6)])[0]
        assert draft.tokens == final[done : done + len(draft.tokens)]
        assert draft.probs is None and len(draft.confidence) == len(draft.tokens)
        rounds, empty = rounds + 1, empty + (not draft.tokens)
        drafter.observe(0, final[done : done + len(draft.tokens) + 1])
        done += len(draft.tokens) + 1
    assert empty <= 0.15 * rounds
    assert (len(final) - 9) / rounds > 4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_outcome_leaves_the_row_as_a_fresh_one_would_be(name):
    """Rejected, partly accepted and unasked tokens: the next proposal is that of a row opened with all of them."""
    drafter = guessing(name)
    generator = torch.Generator().manual_seed(1)
    text = encode(TARGET, TEXT[:60])
    drafter.open(0, text, seed=0)
    for turn in range(10):
        proposed = drafter.propose([Ask(0, 5)])[0].tokens if turn % 4 else []
        own = torch.randint(1, len(TARGET), (1 + turn % 3,), generator=generator).tolist()
        final = [*proposed[: turn % 5], *own]
        drafter.observe(0, final)
        text = [*text, *final]
        fresh = guessing(name)
        fresh.open(0, text, seed=0)
        draft, expected = drafter.propose([Ask(0, 4)])[0], fresh.propose([Ask(0, 4)])[0]
        assert draft.tokens == expected.tokens
        assert draft.confidence == pytest.approx(expected.confidence, rel=1e-3)
        drafter.observe(0, [turn + 40])
        text.append(turn + 40)


def merging(*merges):
    """Letters a to h, each merge (a pair of tokens) makes another token."""
    vocabulary = {token: i for i, token in enumerate([END, " ", *"abcdefgh", *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.decoder = decoders.Fuse()
    return wrapped(tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        # seven letters, read and committed in part, become one token with the eighth
        (
            merging(("g", "h"), ("f", "gh"), ("e", "fgh"), ("d", "efgh"), ("c", "defgh"), ("b", "cdefgh")),
            ["abcdefg", "h"],
        ),
        # pairs are counted from the start of the text: no piece of it says where they are cut
        (merging(("a", "a")), ["a" * 601, "a", "aaa", "a", "ab"]),
    ],
)
def test_text_that_changes_far_back_is_read_again(tokenizer, parts):
    target = TOKENIZERS["bytes"]
    for seed in range(4):
        model = random_llama(tokenizer, seed)
        drafter = TranslatedDrafter(model, tokenizer, target, len(target))
        drafter.open(0, [], seed=0)
        for i, part in enumerate(parts):
            # asked twice, so that what was read is committed
            for more in (part[:-1], part[-1:]):
                drafter.observe(0, encode(target, more))
                draft = drafter.propose([Ask(0, 4)])[0]
            fresh = TranslatedDrafter(model, tokenizer, target, len(target))
            fresh.open(0, encode(target, "".join(parts[: i + 1])), seed=0)
            expected = fresh.propose([Ask(0, 4)])[0]
            assert draft.tokens == expected.tokens
            assert draft.confidence == pytest.approx(expected.confidence, rel=1e-3)
            assert drafter._rows[0].ids == fresh._rows[0].ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("target", ["same", "pieces"])
def test_nothing_is_proposed_broken(name, target):
    """Whatever a random model writes: proposals add whole characters to the text, and leave what stands."""
    tokenizer = TOKENIZERS[target]
    final = encode(tokenizer, TEXT)
    proposals = 0
    for seed in range(3):
        drafter = guessing(name, seed, tokenizer)
        for row, end in enumerate(range(1, len(final), 9)):
            drafter.open(row, final[:end], seed=0)
            draft = drafter.propose([Ask(row, 5)])[0]
            before, after = decode(tokenizer, final[:end]), decode(tokenizer, [*final[:end], *draft.tokens])
            assert after.startswith(before.rstrip("\ufffd"))
            assert not draft.tokens or (not after.endswith("\ufffd") and len(after) > len(before.rstrip("\ufffd")))
            proposals += bool(draft.tokens)
            drafter.close(row)
    assert proposals > 0


@pytest.mark.parametrize("name", ["bytes", "letters", "pieces"])
def test_a_character_that_is_split_over_tokens_is_finished(name):
    """The row stops after each byte of an emoji: the text up to it is known, and the rest of it is proposed whole."""
    text = "told 🙂 there was none there"
    final = encode(TOKENIZERS["bytes"], text)
    for end in range(len("told "), len("told 🙂".encode()) + 1):
        drafter = reading(name, text, TOKENIZERS["bytes"])
        drafter.open(0, final[:end], seed=0)
        for most in (1, 2, 3, 4, 6):
            draft = drafter.propose([Ask(0, most)])[0]
            assert draft.tokens == final[end : end + len(draft.tokens)]
            assert (
                not decode(TOKENIZERS["bytes"], final[: end + len(draft.tokens)]).endswith("\ufffd") or not draft.tokens
            )
            missing = len("told 🙂".encode()) - end
            assert bool(draft.tokens) == (most >= (missing if end > len("told ") else 4) or missing == 0)


def test_bytes_that_never_make_a_character_do_not_stop_the_drafting():
    drafter = guessing("letters")
    broken = encode(TOKENIZERS["bytes"], "🙂")[:1] * 7
    drafter.open(
        0,
        [
            *encode(TARGET, "the cat"),
            *(TARGET.convert_tokens_to_ids(TOKENIZERS["bytes"].convert_ids_to_tokens(broken))),
        ],
        seed=0,
    )
    drafter.propose([Ask(0, 3)])
    drafter.observe(0, encode(TARGET, " sat on the mat while the other"))
    assert drafter.propose([Ask(0, 3)])[0].tokens


def test_the_last_token_waits_for_another_unless_the_draft_has_ended():
    text = "the cat sat on the mat"
    final = encode(TARGET, text)
    drafter = reading("short", text)
    drafter.open(0, final[:2], seed=0)
    draft = drafter.propose([Ask(0, 20)])[0]
    assert draft.tokens == final[2:]
    # the same drafted letters, cut off before the end: "mat" might have become "match"
    drafter = reading("short", text + "ch")
    drafter.open(0, final[:2], seed=0)
    longer = drafter.propose([Ask(0, len(final) - 3)])[0]
    assert longer.tokens == final[2:][: len(longer.tokens)]
    assert len(longer.tokens) < len(final[2:])


def test_tokens_that_would_be_cut_otherwise_get_no_proposal():
    """The row ends inside a word that the tokenizer leaves whole: no token of its own goes on from there."""
    text = "the other cat stood there and complained"
    row = encode(TARGET, "the other cat stood t")
    assert encode(TARGET, text)[: len(row)] != row
    drafter = reading("letters", text)
    drafter.open(0, row, seed=0)
    assert drafter.propose([Ask(0, 4)])[0].tokens == []
    # a target that went on all the same is followed
    drafter.observe(0, encode(TARGET, "here"))
    assert drafter.propose([Ask(0, 2)])[0].tokens == encode(TARGET, " and complained")[:2]


# confidence and limits


def test_confidence_is_the_product_over_the_draft_tokens_that_begin_in_a_token():
    text = "the cat stood there and complained"
    final = encode(TARGET, text)
    drafter = reading("bytes", text)
    drafter.open(0, final[:2], seed=0)
    draft = drafter.propose([Ask(0, 3)])[0]
    assert len(draft.tokens) == 3
    # a byte a draft token, each with 0.9
    assert draft.confidence == pytest.approx([0.9 ** len(decode(TARGET, [token])) for token in draft.tokens], rel=1e-3)


def test_a_draft_token_counts_once_where_it_spans_several():
    text = "the cat stood there and complained ever"
    final = encode(TOKENIZERS["bytes"], text)
    drafter = reading("long", text, TOKENIZERS["bytes"])
    drafter.open(0, final[:7], seed=0)
    draft = drafter.propose([Ask(0, 12)])[0]
    assert draft.tokens == final[7 : 7 + len(draft.tokens)]
    begun = decode(TOKENIZERS["bytes"], draft.tokens)
    drafted = encode(TOKENIZERS["long"], text[7:])
    starts = [len(decode(TOKENIZERS["long"], drafted[:i])) for i in range(len(drafted))]
    expected = [0.9 if i in starts else 1.0 for i in range(len(begun))]
    assert draft.confidence == pytest.approx(expected, rel=1e-3)


def test_keep_going_is_asked_about_proposed_tokens_and_ends_a_rows_draft_alone():
    drafter = reading("bytes")
    final = encode(TARGET, TEXT)
    drafter.open(0, final[:10], seed=0)
    drafter.open(1, final[:20], seed=0)
    seen = []

    def at_most_two(confidences):
        seen.append(list(confidences))
        return len(confidences) < 2

    short, long = drafter.propose([Ask(0, 6, keep_going=at_most_two), Ask(1, 5)])
    assert short.tokens == final[10:12]
    assert long.tokens == final[20:25]
    assert [len(s) for s in seen] == [1, 2]
    assert seen[-1] == short.confidence


def test_the_length_and_the_drafts_context_are_limits():
    tokenizer = TOKENIZERS["bytes"]
    model = Reader(tokenizer, TEXT)
    model.config.max_position_embeddings = 50
    drafter = TranslatedDrafter(model, tokenizer, TARGET, len(TARGET))
    for row, size in enumerate((11, 49, 52)):
        drafter.open(row, encode(TARGET, TEXT[:size]), seed=0)
    roomy, near, full = drafter.propose([Ask(row, 3) for row in range(3)])
    assert len(roomy.tokens) == 3
    assert near.tokens == full.tokens == []
    # without a limit of its own a draft that says little ends too
    silly = guessing("bytes")
    silly.open(0, encode(TARGET, TEXT[:11]), seed=0)
    assert len(silly.propose([Ask(0, 2)])[0].tokens) <= 2


# rows


def test_rows_do_not_disturb_each_other():
    """Rows of different lengths, drafted together and in other orders, against each alone."""
    final = encode(TARGET, TEXT)
    starts = {0: 3, 1: 40, 2: 17}
    together = guessing("short")
    alone = {row: guessing("short") for row in starts}
    for row, end in starts.items():
        together.open(row, final[:end], seed=0)
        alone[row].open(row, final[:end], seed=0)
    for rows in ([0, 1, 2], [2, 0], [1], [1, 2, 0], [0, 1]):
        drafts = together.propose([Ask(row, 3 + row) for row in rows])
        for row, draft in zip(rows, drafts, strict=True):
            single = alone[row].propose([Ask(row, 3 + row)])[0]
            assert draft.tokens == single.tokens
            assert draft.confidence == pytest.approx(single.confidence, rel=1e-4)
        for row in starts:
            new = final[60 + row : 62 + 2 * row]
            together.observe(row, new)
            alone[row].observe(row, new)
    together.close(1)
    together.open(1, final[:9], seed=0)
    fresh = guessing("short")
    fresh.open(0, final[:9], seed=0)
    assert together.propose([Ask(1, 4)])[0].tokens == fresh.propose([Ask(0, 4)])[0].tokens


def test_nothing_is_kept_of_closed_rows():
    drafter = guessing("short")
    for row in range(2):
        drafter.open(row, encode(TARGET, TEXT), seed=0)
    drafter.propose([Ask(0, 2), Ask(1, 2)])
    for row in range(2):
        drafter.observe(row, [50])
    drafter.propose([Ask(0, 2), Ask(1, 2)])
    assert drafter.state_bytes() > 0
    drafter.close(0)
    drafter.close(1)
    assert drafter.state_bytes() == 0
    with pytest.raises(AccelError, match="row 0 is not open"):
        drafter.propose([Ask(0, 2)])


def test_a_row_is_opened_once_and_a_refusal_leaves_nothing():
    drafter = guessing("short")
    drafter.open(0, [5], seed=0)
    with pytest.raises(AccelError, match="row 0 is already open"):
        drafter.open(0, [5], seed=0)
    assert len(drafter.reader.cache.rows) == 1


# cost


@pytest.mark.parametrize("name", ["short", "letters", "pieces", "long"])
def test_a_round_costs_the_same_however_long_the_text(name):
    """Tokens fed to the draft model and characters tokenised, per round, early and late in a long text."""
    text = TEXT * 3
    drafter = reading(name, text)
    final = encode(TARGET, text)
    done, work = 20, []
    drafter.open(0, final[:done], seed=0)
    drafter.propose([Ask(0, 4)])
    while done < len(final) - 8:
        drafter.model.fed.clear()
        drafter.observe(0, final[done : done + 3])
        done += 3
        draft = drafter.propose([Ask(0, 4)])[0]
        assert draft.tokens == final[done : done + len(draft.tokens)]
        work.append(sum(drafter.model.fed))
    # new text, what is held back, and a draft of at most eight tokens for each it is asked for
    assert max(work) <= 8 * 3 + NUM_HELD + 8 * 4
    half = len(work) // 2
    assert sum(work[half:]) <= 1.1 * sum(work[:half]) + 20


def test_only_windows_are_tokenised(monkeypatch):
    drafter = reading("short", TEXT * 3)
    final = encode(TARGET, TEXT * 3)
    drafter.open(0, final[:-60], seed=0)
    drafter.propose([Ask(0, 4)])
    sizes = []
    for codec in (drafter._draft, drafter._final):
        plain = codec.encode
        monkeypatch.setattr(codec, "encode", lambda text, plain=plain: sizes.append(len(text)) or plain(text))
    for done in range(len(final) - 60, len(final) - 30, 3):
        drafter.observe(0, final[done : done + 3])
        drafter.propose([Ask(0, 4)])
    assert 0 < max(sizes) < 600


# special tokens and refusals


def test_special_tokens_are_no_text():
    """A chat template's tokens: drafting starts afresh behind them, and the text around them is read without them."""
    target = byte_level(420)
    target.add_special_tokens({"additional_special_tokens": ["<user>", "<answer>"]})
    user, answer = target.convert_tokens_to_ids(["<user>", "<answer>"])
    tokenizer = TOKENIZERS["short"]
    drafter = TranslatedDrafter(Reader(tokenizer, TEXT), tokenizer, target, len(target))
    head, tail = TEXT[:23], TEXT[23:]
    drafter.open(0, [user, *encode(target, head), answer], seed=0)
    assert drafter.propose([Ask(0, 4)])[0].tokens == encode(target, tail)[:4]
    assert drafter._rows[0].text == head


def test_a_row_without_text_drafts_nothing_or_from_the_draft_models_own_start():
    drafter = guessing("short")
    drafter.open(0, [], seed=0)
    drafter.open(1, encode(TARGET, "the cat"), seed=0)
    empty, other = drafter.propose([Ask(0, 3), Ask(1, 3)])
    assert empty.tokens == []
    assert other.confidence


def test_a_lossy_tokenizer_only_drafts_badly():
    tokenizer = words()
    drafter = TranslatedDrafter(random_llama(tokenizer), tokenizer, TARGET, len(TARGET))
    final = encode(TARGET, TEXT)
    drafter.open(0, final[:30], seed=0)
    for done in range(30, 60, 3):
        tokens = drafter.propose([Ask(0, 3)])[0].tokens
        assert all(0 <= token < len(TARGET) for token in tokens)
        drafter.observe(0, final[done : done + 3])


def test_missing_and_unfitting_tokenizers_are_refused_in_one_line():
    tokenizer = TOKENIZERS["short"]
    model = random_llama(tokenizer)
    with pytest.raises(IncompatibleError, match="no tokenizer for the draft model") as refused:
        TranslatedDrafter(model, None, TARGET, len(TARGET))
    assert "\n" not in str(refused.value)
    with pytest.raises(IncompatibleError, match="no tokenizer for the target"):
        TranslatedDrafter(model, tokenizer, None, len(TARGET))
    with pytest.raises(IncompatibleError, match=r"tokenizer has \d+ tokens and the draft model only 300"):
        TranslatedDrafter(model, TOKENIZERS["long"], TARGET, len(TARGET))
    with pytest.raises(IncompatibleError, match="tokenizer has 420 tokens and the target only 300"):
        TranslatedDrafter(model, tokenizer, TARGET, 300)
