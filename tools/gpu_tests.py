"Run the tests that are marked `cuda` on this machine's GPU, and write down what came of them: nbs/results/bench/gpu_tests.json"
import subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]
record = root/'nbs'/'results'/'bench'/'gpu_tests.json'

def outcome(case):
    "What came of a test case of a JUnit report"
    return next((word for tag,word in (('error','error'),('failure','failed'),('skipped','skipped')) if case.find(tag) is not None), 'passed')

def read(report):
    "Tests of a JUnit report: name, outcome, seconds; a case without a name is no test"
    return [dict(name=f"{c.get('classname')}.{c.get('name')}", outcome=outcome(c), seconds=float(c.get('time'))) for c in ElementTree.parse(report).iter('testcase') if c.get('name')]

def main(more=()):
    import torch
    if not torch.cuda.is_available(): sys.exit('no GPU here: these tests would all be skipped, and nothing was written')
    sys.path.insert(0, str(root))
    from vt_drloc.compare import bench_circumstances, write_json
    files = [str(f) for f in sorted((root/'tests').glob('test_*.py')) if 'mark.cuda' in f.read_text(encoding='utf-8')]
    with tempfile.TemporaryDirectory() as d:
        start,report = time.perf_counter(),Path(d)/'report.xml'
        rc = subprocess.call([sys.executable,'-m','pytest','-q','--tb=short','-m','cuda','--continue-on-collection-errors',f'--junitxml={report}',*more,*files], cwd=root)
        if rc not in (0,1) or not report.exists(): sys.exit(f'pytest ended with {rc}, so it did not run to its end: no record was written')
        rec = dict(section='gpu_tests', circumstances={k:v for k,v in bench_circumstances('cuda').items() if k in ('revision','date','python','versions','device','cuda')}, seconds=round(time.perf_counter()-start, 1), rc=rc, tests=read(report))
    if not more: write_json(record, rec); print(f'written: {record}')
    else: print('a part of the tests only: no record was written')
    return rc

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
