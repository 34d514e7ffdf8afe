package server

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// wait shows a flight to one who waits for it, from its beginning, and returns
// its end. Why is set if the request ended by itself: by a limit of its own, or
// cancelled. The run goes on then while others wait.
func (b *Builds) wait(ctx context.Context, w *waiter, r *request, sink LogSink) (end *ending, why, err error) {
	j := r.job
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	stop := func() {}
	defer func() { stop() }()
	show := func(text string) {
		stop()
		stop = sink.StartWait(j.drvPath, text)
	}
	broken := 0 // attempts that ended transiently while it waited
	for {
		event, end, ok, err := w.Next(ctx)
		if err == nil && event.attempt != nil {
			stop()
			stop = func() {}
			err = b.follow(ctx, cancel, event.attempt, r, sink)
		}
		var limit *limitReached
		var byHand *cancelled
		switch {
		case errors.As(err, &limit):
			return limit.ending(), limit, nil
		case errors.As(err, &byHand):
			return byHand.ending(j.drvPath), byHand, nil
		case err != nil:
			return nil, nil, err
		case !ok:
			return end, nil, nil
		case event.place != "":
			show(event.place)
		case event.broke != nil && slices.Contains(event.waited, r):
			if broken++; broken > j.set.restarts { // others want it tried again
				return event.broke, nil, nil
			}
			sink.Note(event.note)
		case event.note != "":
			sink.Note(event.note)
		}
	}
}

// follow shows the log of an attempt until it ends. Its error is ctx's cause:
// a *limitReached if the run passed a limit of the request's own.
func (b *Builds) follow(ctx context.Context, cancel context.CancelCauseFunc, a *attempt, r *request, sink LogSink) error {
	if err := r.follows(ctx, a); err != nil {
		return err
	}
	r.logs.add(a.logID)
	j := r.job
	stop := watchLimits(a, j, cancel)
	defer stop()
	log, err := b.store.OpenBuildLog(ctx, a.logID)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.cfg.Logger.Error("build log is lost", "build", a.logID, "error", err)
		return nil
	}
	defer log.Close()
	out := sink.StartBuild(j.drvPath)
	defer out.Stop()
	_, err = io.Copy(out, log)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		b.cfg.Logger.Error("build log is lost", "build", a.logID, "error", err)
	}
	return nil
}

// A limitReached says that a run passed a limit of somebody who waits for it.
type limitReached struct {
	status  reuse.Status
	code    nixproto.BuildStatus
	message string
	drvPath nixproto.StorePath
	kind    string // of a timeout
	after   time.Duration
}

func (e *limitReached) Error() string { return e.message }

// ending is the end for whoever set the limit.
func (e *limitReached) ending() *ending {
	return &ending{status: e.status, code: e.code, message: e.message, drvPath: e.drvPath, kind: e.kind, after: e.after}
}

// watchLimits calls cancel with a *limitReached as soon as the run passes a
// limit of j that is stricter than those that the guest itself watches. The
// time counts from when the guest was started. Stop ends the watch and waits
// for it.
func watchLimits(a *attempt, j *job, cancel context.CancelCauseFunc) (stop func()) {
	own, set := Limits{}, &j.set.limits
	if stricter(set.Timeout, a.limits.Timeout) {
		own.Timeout = set.Timeout
	}
	if stricter(set.MaxSilent, a.limits.MaxSilent) {
		own.MaxSilent = set.MaxSilent
	}
	if stricter(set.MaxLogSize, a.limits.MaxLogSize) {
		own.MaxLogSize = set.MaxLogSize
	}
	if own == (Limits{}) {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			reached, next := passed(a.log, j.drvPath, own, time.Now())
			if reached != nil {
				reached.drvPath = j.drvPath
				cancel(reached)
				return
			}
			timer := time.NewTimer(next)
			select {
			case <-timer.C:
			case <-quit:
				timer.Stop()
				return
			}
		}
	}()
	return func() { close(quit); <-done }
}

// passed returns which of the limits l a run has passed, or when to look again.
func passed(log *runLog, drv nixproto.StorePath, l Limits, now time.Time) (*limitReached, time.Duration) {
	next := time.Hour
	if l.MaxLogSize > 0 {
		if log.size.Load() > l.MaxLogSize {
			return &limitReached{status: reuse.LogLimit, code: nixproto.LogLimitExceeded, message: logTooLong(drv, l)}, 0
		}
		next = time.Second // logs grow without telling
	}
	if l.Timeout > 0 {
		left := log.started.Add(l.Timeout).Sub(now)
		if left <= 0 {
			return &limitReached{status: reuse.Timeout, code: nixproto.TimedOut, message: timedOut(drv, l),
				kind: store.TimeoutRun, after: now.Sub(log.started)}, 0
		}
		next = min(next, left)
	}
	if l.MaxSilent > 0 {
		left := log.silentSince().Add(l.MaxSilent).Sub(now)
		if left <= 0 {
			return &limitReached{status: reuse.Timeout, code: nixproto.TimedOut, message: timedOutSilent(drv, l),
				kind: store.TimeoutSilent, after: now.Sub(log.silentSince())}, 0
		}
		next = min(next, left)
	}
	return nil, next
}
