package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/server/settings"
)

// The order of checks for one request is in this file, from what is valid already
// to a run.

// serve answers one request.
func (b *Builds) serve(ctx context.Context, s *Session, j *job, log LogSink) (*nixproto.BuildResult, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, err := b.newRequest(ctx, s, j, cancel)
	if err != nil {
		return nil, err
	}
	return b.serveRequest(ctx, r, log)
}

func (b *Builds) serveRequest(ctx context.Context, r *request, log LogSink) (*nixproto.BuildResult, error) {
	end, err := b.answer(ctx, r, log)
	var c *cancelled
	if err != nil && errors.As(context.Cause(ctx), &c) {
		end, err = c.ending(r.job.drvPath), nil
	}
	r.finish(end, err)
	close(r.done)
	if err != nil {
		return nil, err
	}
	return end.answer(r.job), nil
}

// maxLookups bounds how often a request is looked up anew because an identical
// build ended in between.
const maxLookups = 10

// answer finds what stands in for a run, or runs.
func (b *Builds) answer(ctx context.Context, r *request, log LogSink) (*ending, error) {
	for range maxLookups {
		r.begin()
		if end, err := b.byOutputs(ctx, r, log); end != nil || err != nil {
			return end, err
		}
		end, err := b.byKey(ctx, r, log)
		if err != nil || !end.again {
			return end, err
		}
	}
	return &ending{status: reuse.InternalError, code: nixproto.TransientFailure, drvPath: r.job.drvPath,
		message: fmt.Sprintf("cannot build '%s': what stands in for it came and went again and again", r.job.drvPath)}, nil
}

// byOutputs ends a request whose outputs need no build; nil if they do.
func (b *Builds) byOutputs(ctx context.Context, r *request, log LogSink) (*ending, error) {
	s, j := r.session, r.job
	if j.mode != nixproto.BuildNormal {
		s.Keep(staticOutputs(j.drv)...)
	}
	known, err := b.knownOutputs(ctx, s, j)
	fetched, notFetched := false, ""
	if err == nil && j.mode == nixproto.BuildNormal && !known.complete {
		if fetched, notFetched, err = b.fetchOutputs(ctx, s, j, log); fetched {
			known, err = b.knownOutputs(ctx, s, j)
		}
	}
	if err != nil {
		return nil, err
	}
	valid := &ending{status: reuse.Built, code: nixproto.AlreadyValid, drvPath: j.drvPath, paths: known.paths}
	switch {
	case j.mode == nixproto.BuildNormal && known.complete:
		if fetched {
			r.decide("cache", true, "a cache of the account has the outputs")
		} else {
			r.decide("outputs", true, "all outputs are valid already")
		}
		return valid, nil
	case j.mode == nixproto.BuildCheck && !known.complete:
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath,
			message: fmt.Sprintf("some outputs of '%s' are not valid, so it cannot be checked", j.drvPath)}, nil
	case j.mode == nixproto.BuildRepair && known.complete:
		intact, err := b.intact(ctx, s, known.paths)
		if err != nil {
			return nil, err
		}
		if intact {
			r.decide("outputs", true, "all outputs are valid and intact")
			return valid, nil
		}
	}
	r.decide("outputs", false, "not all outputs are valid")
	if notFetched != "" {
		r.decide("cache", false, notFetched)
	}
	return nil, nil
}

// byKey ends a request with a stored end under its key, with that of an
// identical build, or with that of a run.
func (b *Builds) byKey(ctx context.Context, r *request, log LogSink) (*ending, error) {
	j := r.job
	inputs, missing, err := b.inputs(ctx, r.session, j, log)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath, message: missingInputs(j.drvPath, missing)}, nil
	}
	defer inputs.lease.Release()
	if j.mode == nixproto.BuildNormal { // nothing stands in for a check or repair, nor they for it
		r.keyed(inputs.key)
	}
	stored, err := b.findStored(ctx, r.session, j, inputs.key, r.decide)
	if err != nil {
		return nil, err
	}
	if stored != nil {
		defer stored.close()
		return b.useStored(ctx, r, stored, log)
	}
	return b.fly(ctx, r, inputs, log)
}

// fly waits for the flight of a request, joined or new, until its end or ctx's,
// and takes its outputs into the account's view.
func (b *Builds) fly(ctx context.Context, r *request, in *jobInputs, log LogSink) (end *ending, err error) {
	j := r.job
	// The flight holds its inputs by itself: it may outlive this request.
	lease := r.session.Sight.NewLease()
	lease.Add(j.drv.InputSrcs...)
	lease.Add(staticOutputs(j.drv)...)
	b.planFor(ctx, r)
	run := func(f *flight) *ending {
		defer lease.Release()
		return b.run(f, r, in, lease)
	}
	refused, err := b.mayRun(ctx, r)
	if err != nil {
		lease.Release()
		return nil, err
	}
	var w *waiter
	var started bool
	switch {
	case j.mode == nixproto.BuildNormal && j.set.reuse != settings.ReuseNone:
		if refused != nil {
			run = nil // it may join another's
		}
		w, started, err = b.flights.Join(reuse.FlightID{Scope: j.scope(), Key: in.key}, r, run)
	case refused == nil:
		w, err = b.flights.Start(r, run)
		started = true
	}
	if !started || err != nil {
		lease.Release()
		b.live.unclaim(r)
	}
	if errors.Is(err, reuse.ErrClosed) {
		return nil, errEnding
	} else if err != nil {
		return nil, err
	}
	if w == nil {
		r.decide("run", false, refused.message)
		return refused, nil
	}
	if err := r.boarded(ctx, w, started, log); err != nil {
		w.Leave(nil)
		return nil, err
	}
	var why error // of leaving
	defer func() {
		if w.Leave(why) {
			r.handOver(w.Members())
		} else if why != nil { // who is told of the end finds it in the record, and the guest gone
			<-w.Landed()
		}
	}()
	end, why, err = b.wait(ctx, w, r, log)
	if err == nil && end.starved(j) {
		end = &ending{again: true}
	}
	if err == nil && end.results != nil {
		own := *end // the paths are the same for all that wait; the answer may not be
		return b.enter(ctx, r, &own, end.results)
	}
	return end, err
}

// boarded notes that a request waits for a flight, and says so if it is
// another's.
func (r *request) boarded(ctx context.Context, w *waiter, started bool, log LogSink) error {
	if started {
		r.decide("running", false, "no identical build is under way")
		r.decide("run", true, "nothing stands in for a run")
		return nil
	}
	what := "an identical build"
	for _, other := range w.Members() {
		if other.job.account == r.job.account && other.owned() != nil {
			what = fmt.Sprintf("build %d", other.id())
		}
	}
	r.decide("running", true, what+" is under way")
	log.Note(fmt.Sprintf("'%s' is being built already; waiting for %s", r.job.drvPath, what))
	return r.joined(ctx)
}

// mayRun says why a request must not start a run; nil if it may, and counts as
// one that is under way then.
func (b *Builds) mayRun(ctx context.Context, r *request) (*ending, error) {
	j := r.job
	refuse := func(text string) *ending {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath, message: fmt.Sprintf("cannot build '%s': %s", j.drvPath, text)}
	}
	if hours := j.set.monthly; hours != nil {
		used, err := b.store.Usage(ctx, j.account, time.Now())
		if err != nil {
			return nil, err
		}
		if float64(used.LimitSeconds) >= *hours*3600 {
			return refuse(fmt.Sprintf("its account has used %.2f of the %g CPU hours that max-cpu-hours-per-month allows; what was built before is still served",
				float64(used.LimitSeconds)/3600, *hours)), nil
		}
	}
	if n := j.set.maxRunning; !b.live.claim(r, n) {
		return refuse(fmt.Sprintf("its account has %d builds under way, as many as max-running-builds allows", n)), nil
	}
	return nil, nil
}
