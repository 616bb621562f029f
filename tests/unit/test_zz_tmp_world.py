import time, cProfile, pstats, io
from interp.testbed.text import Text
def test_x():
    t=time.process_time(); d=list(Text(1).documents(500)); a=time.process_time()-t
    t=time.process_time(); [x.ids() for x in d]; b=time.process_time()-t
    t=time.process_time(); [x.labelled() for x in d]; c=time.process_time()-t
    p=cProfile.Profile(); p.enable(); list(Text(2).documents(200)); p.disable()
    s=io.StringIO(); pstats.Stats(p,stream=s).sort_stats('tottime').print_stats(14); print(s.getvalue())
    print(a,b,c)
    assert 0
