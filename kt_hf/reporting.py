"""temporary"""
def finish(context, results, seconds):
    for name, rs in results.items():
        print(name, [round(r["metrics"][r["primary_metric"]],3) for r in rs], {k: round(v,2) if isinstance(v,float) else v for k,v in rs[0]["cost"].items()})
    print("seconds", seconds)
    return results
