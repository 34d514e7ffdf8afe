package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/server/settings"
	"nbd/store"
)

// What stands in for a run, in this order:
//
//	outputs    all are usable by the account           build.go
//	cache      a substituter has them                   build.go
//	success    one is stored under the key              this file
//	failure    a permanent one is, of this generation
//	timeout    one is, of a run longer than the limit
//	running    an identical build is under way          build.go, wait.go
//	run                                                 run.go
//
// Each check and its reason is kept with the request (`why`). Reasons tell
// nothing of other accounts but that, and when, something was stored.

// A storedEnd is what was found under a key. One field is set; of other ends
// than a success the log is there.
type storedEnd struct {
	success *store.Result
	failure *store.Failure
	timeout *store.Timeout
	kind    string // of the timeout
	log     io.ReadCloser
	hold    *store.Hold // on the contents of success
}

// close gives back what a storedEnd holds.
func (e *storedEnd) close() {
	e.hold.Release()
	if e.log != nil {
		_ = e.log.Close() // it was only read
	}
}

// findStored looks for a stored end that may answer j, and says in notes, if
// they are not nil, what it found. The caller closes it; nil if there is none.
func (b *Builds) findStored(ctx context.Context, s *Session, j *job, key reuse.Key, note func(check string, taken bool, reason string)) (*storedEnd, error) {
	if j.mode != nixproto.BuildNormal {
		note("success", false, "a check or repair always runs")
		return nil, nil
	}
	if j.set.reuse == settings.ReuseNone {
		note("success", false, "reuse-results is none")
		return nil, nil
	}
	f := &finder{b: b, s: s, j: j, note: note}
	for _, own := range []store.AccountID{j.account, 0} {
		ends, err := b.store.Ends(ctx, key, own)
		if err != nil {
			return nil, err
		}
		f.ends = append(f.ends, ends)
	}
	for _, find := range []func(context.Context) (*storedEnd, error){f.success, f.failure, f.timeout} {
		if end, err := find(ctx); end != nil || err != nil {
			return end, err
		}
	}
	return nil, nil
}

// A finder looks through what is stored under one key.
type finder struct {
	b    *Builds
	s    *Session
	j    *job
	note func(check string, taken bool, reason string)
	ends []*store.Ends // the account's own first
	// failed says that there is a failure of this generation.
	failed bool
}

// mayUse reports whether an end of that account may answer.
func (f *finder) mayUse(a store.AccountID) bool {
	return a == f.j.account || !f.j.set.own() && f.s.shares(a)
}

// whose names the build of an end: with its id to the account that ran it, with
// its time to others.
func (f *finder) whose(build store.BuildID, a store.AccountID, t time.Time) string {
	return whoseBuild(f.j.account, build, a, t)
}

func whoseBuild(asks store.AccountID, build store.BuildID, a store.AccountID, t time.Time) string {
	if a == asks {
		return fmt.Sprintf("build %d", build)
	}
	return "an identical build of " + t.UTC().Format("2006-01-02 15:04 UTC")
}

// none is why no end answers: the same whether there is none, or one of somebody
// who does not share it.
func (f *finder) none() string {
	if f.j.set.own() {
		return "none of this account is stored under the key"
	}
	return "none is stored under the key"
}

func (f *finder) success(ctx context.Context) (*storedEnd, error) {
	why := f.none()
	for _, ends := range f.ends {
		r := ends.Success
		if r == nil || !f.mayUse(r.Account) {
			continue
		}
		hold, err := f.b.holdOutputs(ctx, r)
		if err != nil {
			return nil, err
		}
		if hold != nil {
			f.note("success", true, "reused from "+f.whose(r.Build, r.Account, r.Time))
			return &storedEnd{success: r, hold: hold}, nil
		}
		why = "its contents are not stored any more"
	}
	f.note("success", false, why)
	return nil, nil
}

// holdOutputs holds the contents of a success; nil if they are not all there.
func (b *Builds) holdOutputs(ctx context.Context, r *store.Result) (*store.Hold, error) {
	var hashes []nixproto.Hash
	for _, out := range r.Outputs {
		hashes = append(hashes, out.NarHash)
	}
	hold, err := b.store.Hold(hashes...)
	if err != nil {
		return nil, err
	}
	for _, h := range hashes {
		there, err := b.store.HasBlob(ctx, h)
		if err != nil || !there {
			hold.Release()
			return nil, err
		}
	}
	return hold, nil
}

func (f *finder) failure(ctx context.Context) (*storedEnd, error) {
	if kind, _ := f.j.drv.Kind(); kind == nixproto.FixedOutput {
		f.note("failure", false, "failures of fixed outputs are never reused")
		return nil, nil
	}
	why := f.none()
	for _, ends := range f.ends {
		if !slices.ContainsFunc(slices.Collect(maps.Values(ends.Failures)), func(x *store.Failure) bool { return f.mayUse(x.Account) }) {
			continue
		}
		generation, err := f.b.generation(ctx, f.j.drv.System)
		if err != nil {
			return nil, err
		}
		fail := ends.Failures[generation]
		switch {
		case fail == nil || generation == "":
			why = "the one that is stored is of another sandbox"
			continue
		case !f.mayUse(fail.Account):
			continue
		case fail.MemoryMiB > 0 && fail.MemoryMiB < f.j.set.memoryMiB:
			why = "the guest of the one that is stored had less memory"
			continue
		}
		f.failed = true
		if !f.j.set.failures || f.j.restart != nil {
			why = "reuse-build-failures is false"
			if f.j.restart != nil {
				why = "it was started again on purpose"
			}
			continue
		}
		log, err := f.b.store.OpenBuildLog(ctx, fail.Log)
		if errors.Is(err, store.ErrNotFound) {
			why = "its log is not stored any more"
			continue
		} else if err != nil {
			return nil, err
		}
		f.note("failure", true, "reused from "+f.whose(fail.Build, fail.Account, fail.Time))
		return &storedEnd{failure: fail, log: log}, nil
	}
	f.note("failure", false, why)
	return nil, nil
}

func (f *finder) timeout(ctx context.Context) (*storedEnd, error) {
	why := f.none()
	for _, ends := range f.ends {
		for _, kind := range []string{store.TimeoutRun, store.TimeoutSilent} {
			t := ends.Timeouts[kind]
			if t == nil || !f.mayUse(t.Account) {
				continue
			}
			limit := f.j.set.limits.Timeout
			if kind == store.TimeoutSilent {
				limit = f.j.set.limits.MaxSilent
			}
			switch {
			case !f.j.set.timeouts:
				why = "reuse-build-timeouts is false"
				continue
			case f.j.restart != nil:
				why = "it was started again on purpose"
				continue
			case f.failed:
				why = "there is a failure, too, which counts more"
				continue
			case limit == 0 || t.After < limit:
				why = "the run that timed out was shorter than the limit that applies now"
				continue
			}
			log, err := f.b.store.OpenBuildLog(ctx, t.Log)
			if errors.Is(err, store.ErrNotFound) {
				why = "its log is not stored any more"
				continue
			} else if err != nil {
				return nil, err
			}
			f.note("timeout", true, "reused from "+f.whose(t.Build, t.Account, t.Time))
			return &storedEnd{timeout: t, kind: kind, log: log}, nil
		}
	}
	f.note("timeout", false, why)
	return nil, nil
}

// generation is the sandbox generation that a run for a system would have now;
// "" if it cannot be told. After a start it takes a moment to be known.
func (b *Builds) generation(ctx context.Context, system string) (string, error) {
	g, err := b.cfg.Runner.Generation(ctx, system)
	switch {
	case err != nil && ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		// A run would meet the same, and say so.
		b.cfg.Logger.Warn("sandbox generation is not known; failures are not reused", "err", err)
	case g != "" && b.cfg.Generation != 0:
		g += fmt.Sprintf("/operator:%d", b.cfg.Generation)
	}
	return g, nil
}

// useStored answers a request with a stored end.
func (b *Builds) useStored(ctx context.Context, r *request, e *storedEnd, sink LogSink) (*ending, error) {
	j := r.job
	switch {
	case e.success != nil:
		end, err := b.enter(ctx, r, &ending{status: reuse.Built, code: nixproto.Built, drvPath: j.drvPath, outputs: recorded(e.success.Outputs),
			build: e.success.Build, account: e.success.Account, log: e.success.Log}, e.success.Outputs)
		if err != nil || end.status != reuse.Built {
			return end, err
		}
		sink.Note(fmt.Sprintf("'%s' is not built: reused from %s", j.drvPath, whoseBuild(j.account, e.success.Build, e.success.Account, e.success.Time)))
		return end, nil
	case e.failure != nil:
		return b.replay(ctx, j, e, e.failure, reuse.BuildFailed, sink,
			"this is the reused failure of %s; set reuse-build-failures to false to have it run again")
	}
	return b.replay(ctx, j, e, &e.timeout.Failure, reuse.Timeout, sink,
		"this is the reused timeout of %s; set reuse-build-timeouts to false to have it run again")
}

// replay shows the log of an earlier run, whole, and what came of it.
func (b *Builds) replay(ctx context.Context, j *job, e *storedEnd, f *store.Failure, status reuse.Status, sink LogSink, text string) (*ending, error) {
	out := sink.StartBuild(j.drvPath)
	_, err := io.Copy(out, contextReader{ctx, e.log})
	out.Stop()
	if err != nil {
		return nil, fmt.Errorf("replay the log of build %d: %w", f.Log, err)
	}
	note := fmt.Sprintf(text, whoseBuild(j.account, f.Build, f.Account, f.Time))
	sink.Note(fmt.Sprintf("'%s' was not run: %s", j.drvPath, note))
	message := strings.ReplaceAll(f.Message, string(f.DrvPath), string(j.drvPath))
	return &ending{status: status, code: f.Code, drvPath: j.drvPath, message: message + "\n(" + note + ")",
		build: f.Build, account: f.Account, log: f.Log}, nil
}

// A contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
