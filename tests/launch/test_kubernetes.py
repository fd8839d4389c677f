"""launch/gke_jobset_*.yaml: fields that Kubernetes and JobSet know, which say what is meant.

An API server may drop a field that it does not know: a misspelt one would be a setting that is not
there.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip('yaml', reason='no PyYAML: pip install -e .[test]')
kubernetes_validate = pytest.importorskip(
  'kubernetes_validate', reason='no kubernetes-validate: pip install -e .[test]'
)

LAUNCH = Path(__file__).parents[2] / 'launch'
KUBERNETES = '1.33'
EXIT_CODES = {'done': 0, 'bad input': 1, 'stopped': 75, 'peer lost': 134, 'no memory': 137}
# Fields of JobSet v1alpha2 and their types; a dict is an object, [dict] a list of them, a set the
# values there are. https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
ACTIONS = {'FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts'}
SPEC = {
  'replicatedJobs': [{'name': str, 'groupName': str, 'replicas': int, 'template': object}],
  'network': {'enableDNSHostnames': bool, 'subdomain': str, 'publishNotReadyAddresses': bool},
  'successPolicy': {'operator': {'All', 'Any'}, 'targetReplicatedJobs': [str]},
  'failurePolicy': {
    'maxRestarts': int,
    'restartStrategy': {'Recreate', 'BlockingRecreate'},
    'rules': [
      {
        'name': str,
        'action': ACTIONS,
        'onJobFailureReasons': [str],
        'targetReplicatedJobs': [str],
      }
    ],
  },
  'suspend': bool,
  'coordinator': {'replicatedJob': str, 'jobIndex': int, 'podIndex': int},
  'ttlSecondsAfterFinished': int,
}
JOBSET = {
  'apiVersion': {'jobset.x-k8s.io/v1alpha2'},
  'kind': {'JobSet'},
  'metadata': {'name': str, 'namespace': str, 'annotations': object, 'labels': object},
  'spec': SPEC,
}


def wrong(value, schema, place='jobset'):
  """Paths at which an object does not match the schema."""
  if schema is object:
    return [] if isinstance(value, dict) else [place]
  if isinstance(schema, set):
    return [] if value in schema else [f'{place}: {value}']
  if isinstance(schema, type):
    return [] if type(value) is schema else [f'{place}: {value}']
  if isinstance(schema, list):
    if not isinstance(value, list):
      return [place]
    return [w for i, item in enumerate(value) for w in wrong(item, schema[0], f'{place}[{i}]')]
  if not isinstance(value, dict):
    return [place]
  found = [f'{place}.{name}' for name in value.keys() - schema.keys()]
  for name in value.keys() & schema.keys():
    found += wrong(value[name], schema[name], f'{place}.{name}')
  return found


def check(jobset):
  """Raises if a field is unknown or has another type."""
  assert not (found := wrong(jobset, JOBSET)), found
  for job in jobset['spec']['replicatedJobs']:
    assert job['template'].keys() <= {'metadata', 'spec'}
    whole = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': job['name']}}
    kubernetes_validate.validate(whole | job['template'], KUBERNETES, strict=True)


class Manifest:
  """A JobSet with one kind of job, and the parts of it."""

  def __init__(self, kind):
    text = (LAUNCH / f'gke_jobset_{kind}.yaml').read_text()
    (self.jobset,) = yaml.safe_load_all(text)
    self.spec = self.jobset['spec']
    (self.replicated,) = self.spec['replicatedJobs']
    self.job = self.replicated['template']['spec']
    self.pod = self.job['template']['spec']
    (self.container,) = self.pod['containers']
    self.flags = dict(a[2:].split('=', 1) for a in self.container['args'] if a.startswith('--'))
    self.env = {e['name']: e for e in self.container['env']}


@pytest.fixture(params=['tpu', 'gpu'])
def manifest(request):
  return Manifest(request.param)


def test_every_field_is_known(manifest):
  check(manifest.jobset)


def passes(jobset):
  try:
    check(jobset)
  except (AssertionError, kubernetes_validate.ValidationError):
    return False
  return True


@pytest.mark.seconds
def test_a_misspelt_field_is_not(manifest):
  """Yields every name of the tree."""
  free = {'annotations', 'labels', 'nodeSelector', 'limits'}  # names that users make

  def names(node, path=()):
    if isinstance(node, dict):
      for name, value in node.items():
        yield (*path, name)
        if name not in free:
          yield from names(value, (*path, name))
    elif isinstance(node, list):
      for i, value in enumerate(node):
        yield from names(value, (*path, i))

  paths = [path for path in names(manifest.jobset) if isinstance(path[-1], str)]
  assert len(paths) > 60
  for path in paths:
    broken = copy.deepcopy(manifest.jobset)
    node = broken
    for part in path[:-1]:
      node = node[part]
    node[path[-1] + 'x'] = node.pop(path[-1])
    assert not passes(broken), path


def test_the_binary_has_these_flags(manifest):
  script = 'import csba_jax.bin.train; from absl import flags; print(*flags.FLAGS)'
  done = subprocess.run([sys.executable, '-c', script], cwd=LAUNCH.parent, capture_output=True)
  assert 'csba-train' in [*manifest.container['command'], *manifest.container['args']]
  assert set(manifest.flags) <= set(done.stdout.decode().split()), done.stderr


def test_processes_are_as_many_as_pods(manifest):
  job = manifest.job
  assert job['completionMode'] == 'Indexed'
  assert job['parallelism'] == job['completions'] > 1
  assert manifest.replicated['replicas'] == 1
  assert int(manifest.flags.get('processes', job['completions'])) == job['completions']


def test_a_slice_has_the_hosts_of_its_topology():
  tpu = Manifest('tpu')
  rows, columns = tpu.pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  chips = tpu.container['resources']['limits']['google.com/tpu']
  assert int(rows) * int(columns) == chips * tpu.job['completions']
  assert tpu.flags['distributed'] == 'on'
  (topology,) = tpu.jobset['metadata']['annotations'].values()
  assert topology == 'cloud.google.com/gke-nodepool'


def test_gpu_pods_find_their_coordinator():
  """From the annotation that JobSet derives from spec.coordinator; Jobs give the index."""
  gpu = Manifest('gpu')
  assert gpu.spec['coordinator'] == {
    'replicatedJob': gpu.replicated['name'],
    'jobIndex': 0,
    'podIndex': 0,
  }
  source = gpu.env['COORDINATOR']['valueFrom']['fieldRef']['fieldPath']
  assert source == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
  (port,) = gpu.container['ports']
  assert gpu.flags['coordinator'] == f'$(COORDINATOR):{port["containerPort"]}'
  assert gpu.flags['process'] == '$(JOB_COMPLETION_INDEX)'
  assert gpu.spec['network'] == {'enableDNSHostnames': True, 'publishNotReadyAddresses': True}


def outcome(manifest, code, disrupted=False):
  """What becomes of the JobSet after a pod: by the rules of Jobs, then by those of JobSets."""
  reason = 'BackoffLimitExceeded'
  assert manifest.job['backoffLimit'] == 0
  for rule in manifest.job['podFailurePolicy']['rules']:
    codes = rule.get('onExitCodes')
    if codes:
      assert codes['containerName'] == manifest.container['name']
      matches = (code in codes['values']) == (codes['operator'] == 'In') and code != 0
    else:
      matches = disrupted and rule['onPodConditions'][0]['type'] == 'DisruptionTarget'
    if matches:
      reason = {'FailJob': 'PodFailurePolicy', 'Count': reason}[rule['action']]
      break
  for rule in manifest.spec['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons']:
      return rule['action']
  return 'RestartJobSet'


def test_exit_codes_decide_what_is_started_again(manifest):
  found = {name: outcome(manifest, code) for name, code in EXIT_CODES.items() if code}
  assert found == {
    'bad input': 'FailJobSet',
    'stopped': 'RestartJobSet',
    'peer lost': 'RestartJobSet',
    'no memory': 'FailJobSet',
  }
  assert outcome(manifest, 137, disrupted=True) == 'RestartJobSet'
  assert manifest.pod['restartPolicy'] == 'Never', 'exit codes count with this policy only'
  assert manifest.spec['failurePolicy']['maxRestarts'] > 0
  assert manifest.pod['shareProcessNamespace'] is True, 'an abort of process 1 is exit code 139'
  assert manifest.pod['terminationGracePeriodSeconds'] >= 60


def test_both_variants_treat_failures_alike():
  tpu, gpu = Manifest('tpu'), Manifest('gpu')
  assert tpu.spec['failurePolicy'] == gpu.spec['failurePolicy']
  assert tpu.job['podFailurePolicy'] == gpu.job['podFailurePolicy']


def test_the_workdir_is_on_the_shared_volume(manifest):
  mounts = {mount['name']: mount['mountPath'] for mount in manifest.container['volumeMounts']}
  claims = [v['name'] for v in manifest.pod['volumes'] if 'persistentVolumeClaim' in v]
  (place,) = (mounts[claim] for claim in claims)
  assert manifest.flags['workdir'].startswith(f'{place}/')
  assert manifest.env['CSBA_CACHE_DIR']['value'].startswith(f'{place}/')
  assert (LAUNCH.parent / manifest.flags['config']).exists()


def test_the_header_says_how_to_start_and_how_to_delete(manifest):
  for kind in ('tpu', 'gpu'):
    text = (LAUNCH / f'gke_jobset_{kind}.yaml').read_text()
    header = re.match(r'(#.*\n)+', text).group()
    for words in ('Needs: ', 'Costs: ', 'kubectl apply', 'kubectl delete jobset csba'):
      assert words in header
    # a bucket whose metadata is cached shows one host nothing of what another wrote
    assert 'metadata-cache:ttl-secs:0' in header
  assert manifest.container['image'] == 'IMAGE', 'what the header replaces'
