"""report.md: everything there, nothing of a user's alive."""

import dataclasses
import re

import numpy as np
import pytest

from csba_jax.analysis import wording
from csba_jax.report.study import markdown
from csba_jax.runtime import plain

SECTIONS = [
  'Summary',
  'Notes',
  'Scores',
  'Paired differences',
  'Non-inferiority',
  'F1 of each class',
  'Conflict matrices, control and treatment',
  'Conflict over training',
  'Gradient flow',
  'Similarity of the branches',
  'Conflict reduction and F1 gain',
  'Are the matrices alike?',
  'Noise floor',
  'Naive split against grouped folds',
  'Confusion matrices',
  'How it was made',
]


def tables(text):
  """Every table, as lines."""
  return [t.splitlines() for t in text.split('\n\n') if t.startswith('| ')]


def cells(line):
  return [cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]


@pytest.fixture(scope='module')
def text(made_up):
  return markdown.render(made_up.findings())


def test_every_section_in_order(text):
  assert re.findall('^## (.*)$', text, re.M) == SECTIONS
  assert text.startswith('# Study cifar10_lt\n\nDoes Class-Specific Branch Attention')
  assert text.endswith('```\n\n</details>\n')


def test_overall_verdict_first(text):
  shown, folded = text.split('## Summary\n\n')[1].split('</details>')[0].split('<details>')
  assert shown.split('\n\n')[:6] == [
    '- **UNDECIDED** It is open whether all links hold.',
    '- **SUPPORTED** CSBA has a higher macro-F1 than none.',
    '- **NOT SUPPORTED** It is capacity.',
    '- **UNDECIDED** It is open.',
    '- **UNTESTED** It was not tested.',
    '![forest plot](forest.svg)',
  ]
  head, overall = folded.split('\n\n')[:2]
  assert head == '\n<summary>Every comparison behind these verdicts</summary>'
  assert overall.splitlines() == [
    '- **Overall: CSBA makes a better tail by less conflict**: **UNDECIDED**',
    '  - The chain breaks at its second link.',
  ]


def test_folds_open_and_close_and_their_titles_are_text(made_up):
  text = markdown.render(made_up.hostile())
  prose = re.sub(r'^(`{3,})text\n.*?^\1$', '', text, flags=re.M | re.S)
  depth = 0
  for tag in re.findall('^</?details>$', prose, re.M):
    depth += 1 if tag == '<details>' else -1
    assert depth in (0, 1, 2)
  assert depth == 0
  assert not re.search('<summary>.*<(?!/summary>)', prose)


def test_scores_to_the_letter(made_up):
  made = made_up.findings(variants=('none', 'csba'), methods=('cross_entropy',))
  estimate = dataclasses.replace(made.scores[0].metrics['accuracy'], value=0.5, low=0.4, high=0.61)
  score = dataclasses.replace(made.scores[0], metrics={'accuracy': estimate})
  text = markdown.render(dataclasses.replace(made, scores=(score,)))
  table = text.split('## Scores\n\n')[1].split('\n\n')[1]
  assert table == (
    '| variant | parameters |   n |             accuracy |\n'
    '| ------- | ---------: | --: | -------------------: |\n'
    '| none    |  1,350,000 |   5 | 0.500 [0.400, 0.610] |'
  )


def test_captions_say_what_intervals_and_p_are(text):
  words_of_it = ' '.join(text.split())
  assert 'intervals are cut to what the number can be: a metric from 0 to 1, ' in words_of_it
  assert 'the margin of 0.02. p is that of no difference at all. ' in words_of_it


def with_groups(made, *shares):
  return dataclasses.replace(made, groups=tuple(np.array(of_cell, float) for of_cell in shares))


def groups_of(text, section):
  """The items of a section that name the groups, each on one line."""
  part = text.partition(f'## {section}\n')[2].partition('\n## ')[0]
  (items,) = (block for block in part.split('\n\n') if ': majority ' in block)
  return items.replace('\n  ', ' ').splitlines()


@pytest.mark.parametrize('section', ['Scores', 'Conflict matrices, control and treatment'])
def test_head_and_tail_are_named_once_for_conditions_that_agree(made_up, section):
  made = made_up.findings(('none', 'csba'), classes=('ant', 'b|d', 'cat', 'dog'), seeds=2)
  of_all = [[1, 1, 0, 0], [0, 0, 1, 1]]
  text = markdown.render(with_groups(made, of_all, of_all))
  assert groups_of(text, section) == ['- all runs: majority ant, b\\|d; minority cat, dog.']
  text = markdown.render(with_groups(made, of_all, [[1, 0, 0, 0], [0, 0.25, 0, 1]]))
  assert groups_of(text, section) == [
    '- cross entropy: majority ant, b\\|d; minority cat, dog.',
    '- balanced softmax: majority ant; minority b\\|d (in 25 % of the runs), dog; head F1 is that'
    ' of a single class.',
  ]


def test_many_classes_of_a_group_are_counted(made_up):
  made = made_up.findings(('none', 'csba'), ('drw',), classes=[f'c{i}' for i in range(40)], seeds=2)
  text = markdown.render(with_groups(made, [[1] * 13 + [0] * 27, [0] * 28 + [1] * 12]))
  twelve = ', '.join(f'c{i}' for i in range(28, 40))
  (line,) = groups_of(text, 'Scores')
  assert line == f'- all runs: majority 13 classes; minority {twelve}.'


def test_tables_are_aligned_and_complete(text):
  for table in tables(text):
    assert len({len(line) for line in table}) == 1, table[0]
    assert len({len(cells(line)) for line in table}) == 1, table[0]
    assert re.fullmatch(r'[| :-]+', table[1])


def test_paragraphs_fit_a_terminal(text):
  prose = re.sub('^```.*?^```$', '', text, flags=re.M | re.S).splitlines()
  assert max(len(line) for line in prose if not line.startswith(('|', '#'))) <= 100


def test_nothing_undefined_is_written(text, made_up):
  for made in (text, markdown.render(made_up.findings(seeds=1))):
    assert not re.search(r'\b(nan|inf|none yet)\b', made, re.I)
    assert 'NaN' not in made


def test_one_seed_has_no_intervals_and_says_so(made_up):
  text = markdown.render(made_up.findings(seeds=1))
  assert '[–\\]: no interval: 1 unit.' in text
  assert 'n = 1 unit; no intervals' in text
  assert '95 % interval' not in text.split('## Scores')[1]


def test_empty_sections_are_left_out(made_up):
  text = markdown.render(made_up.bare(made_up.findings()))
  assert re.findall('^## (.*)$', text, re.M) == ['Scores', 'F1 of each class', 'Confusion matrices']


def test_hostile_names_stay_text(made_up):
  text = markdown.render(made_up.hostile())
  prose = re.sub(r'^(`{3,})text\n.*?^\1$', '', text, flags=re.M | re.S)
  assert '<script' not in prose
  assert '&lt;script&gt;alert(1)&lt;/script&gt;\\|x' in prose
  assert r'\`x\` \*\*b\*\* &lt;b&gt;' in prose
  assert 'a b \\| c' in prose  # the line break is gone
  assert r'!\[i\](http' in prose
  assert '&amp;amp;' in prose
  assert '- \\# not a heading' in prose
  assert '- \\- not a list' in prose
  assert '\x1b' not in text
  text.encode()  # without half characters
  assert re.findall('^## (.*)$', prose, re.M) == SECTIONS
  for table in tables(prose):
    assert len({len(cells(line)) for line in table}) == 1, table[0]


def test_code_cannot_end_its_fence(made_up):
  text = markdown.render(made_up.hostile())
  assert "````text\ncsba-study --workdir='<script>alert(1)</script>|x/```'\n````" in text


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('csba_class', 'csba_class'),  # no emphasis inside a word
    ('_a_ __b', r'\_a\_ \_\_b'),
    ('0.1 [0.0, 0.2]', '0.1 [0.0, 0.2]'),
    ('[a](b) [a][b] [a]: b [^1]', r'[a\](b) [a\][b] [a\]: b \[^1]'),
    ('p < 0.001, a<b>', 'p < 0.001, a&lt;b&gt;'),
    ('a\\|b', r'a\\\|b'),
    ('a & b &lt;', 'a & b &amp;lt;'),
    ('$x$ ~~y~~', r'\$x\$ \~\~y\~\~'),
    ('a\r\nb\x00\u202e', 'a b\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}'),
  ],
)
def test_escape(given, expected):
  assert markdown.escape(given) == expected


def test_same_findings_same_text(made_up, text):
  assert markdown.render(made_up.findings()) == text


def test_many_classes_have_no_matrices(made_up):
  made = made_up.findings(('none', 'csba'), ('drw',), classes=[f'c{i}' for i in range(13)], seeds=2)
  text = markdown.render(made)
  assert 'c12 (50)' in text
  assert 'Cosines, none.' not in text


def test_classes_stand_with_their_images_in_each_condition(made_up):
  found = made_up.findings(('none', 'csba'), classes=('ant', 'bee', 'cat'), seeds=2)
  found = dataclasses.replace(found, class_counts=(np.array([9, 3, 1]), np.array([2, 8.5, 4])))
  text = markdown.render(found).partition('## F1 of each class')[2].partition('\n## ')[0]
  rows = [line.split('|')[1:3] for line in text.splitlines() if line.startswith('| ')]
  names = [name.strip() for name, _ in rows if '(' in name and 'training' not in name]
  assert names == ['ant (9)', 'bee (3)', 'cat (1)', 'bee (8.5)', 'cat (4)', 'ant (2)']
  second = next(score for score in found.scores if score.cell['method'] == 'balanced_softmax')
  row = next(f1.strip() for name, f1 in rows if 'bee (8.5)' in name)
  assert row == wording.interval(second.per_class_f1[1])  # the class's own, wherever it stands


def test_what_was_measured_on_one_part_only(made_up):
  made = made_up.findings(methods=('drw',))
  flows = [flow for flow in made.flows if flow.part == 'val' or flow.at == '0']
  text = markdown.render(dataclasses.replace(made, flows=flows))
  assert 'Norm of each class gradient in the scope shared; snapshot start' in text


@pytest.mark.parametrize(
  ('kinds', 'there', 'absent'),
  [
    (
      ('frozen',),
      ['of the net as it is used'],
      ['those that training takes, est', 'higher than that over all training images'],
    ),
    (
      ('batch',),
      ['those that training takes, estimated from', 'higher than that over all training images'],
      ['as it is used', 'estimated anew'],
    ),
    (('none',), [], ['as it is used', 'training takes', 'estimated anew']),
  ],
)
def test_it_says_which_gradient_was_measured(made_up, kinds, there, absent):
  made = made_up.findings()
  made = dataclasses.replace(made, about={**made.about, 'statistics': kinds})
  text = ' '.join(markdown.render(made).split())
  assert all(words in text for words in there)
  assert not any(words in text for words in absent)


def test_gates_stand_in_the_order_of_class_sizes(made_up):
  made = made_up.findings()
  (one, *_) = (found for found in made.branch_similarity if found.gates)
  counts = tuple(of_cell[::-1] for of_cell in made.class_counts)  # the last class is the largest
  for turned, names in ((made, made.class_names), (None, made.class_names[::-1])):
    turned = turned or dataclasses.replace(made, class_counts=counts)
    part = markdown.render(turned).split(f'Mean gates by class, {one.variant}')[1]
    table = next(lines for lines in tables(part) if cells(lines[0])[0] == 'block, branch')
    assert cells(table[0])[1:] == [plain.clean(name) for name in names]
    block, gates = next(iter(one.gates.items()))
    values = gates[0] if turned is made else gates[0][::-1]
    assert cells(table[2])[0] == f'{plain.clean(block)}, 1'
    assert cells(table[2])[1:] == [wording.number(value) for value in values]
