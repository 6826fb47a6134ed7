from tests.statistics.test_units import *
def test_x(resized, token_ids):
    for by_k, by_v in ((1.0, 1.0), (2.**23, 2.**-20), (1.5,1.0),(1.0,1.5), (1e7, 1.0),(1.0,1e-6),(1.2,1.0),(1.7,1.0),(1.2,1.2),(1.7,1.7)):
        found=[]
        for seed in range(8):
            model = resized(by_k, by_v)
            calibration = calibrate(model, [token_ids(2, 200, seed=9)], progress=False)
            found.append(logit_error(model, token_ids(4,200,seed=seed), headq_config(**MODEL | dict(k_bits=8,v_bits=8), calibration=calibration))[0])
        if by_k==by_v==1: base=found
        print("FOUND", by_k,by_v, [round(x/y,3) for x,y in zip(found,base)], sum(found)/sum(base))
