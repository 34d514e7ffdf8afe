package server

import (
	"context"
	"math"
	"slices"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// giveOwner makes an attempt that of a request that waits for it: of the owner
// of the attempt before, else of the one that has waited longest.
func (b *Builds) giveOwner(f *flight, a *attempt) error {
	members, _ := f.Members()
	if willing := slices.DeleteFunc(slices.Clone(members), func(m *request) bool { return m.job.set.restarts < a.transient }); len(willing) > 0 {
		members = willing // the others do not wait for this one
	}
	var r *request
	if a.before != nil && (slices.Contains(members, a.before.owner) || len(members) == 0) {
		r = a.before.owner
	} else if len(members) > 0 {
		r = members[0]
	} else {
		return context.Cause(f.Context()) // all have left
	}
	a.owner = r
	if err := r.take(a); err != nil {
		return err
	}
	members, _ = f.Members() // it may have left before it was told
	a.handOver(members)
	return nil
}

// take makes the request the owner of an attempt. If it owned one before, the
// new one gets a record of its own.
func (r *request) take(a *attempt) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ran {
		id, err := r.b.store.ReserveBuild(context.Background())
		if err != nil {
			return err
		}
		old := *r.record
		next := store.Build{ID: id, Account: old.Account, DrvPath: old.DrvPath, Name: old.Name, System: old.System, Tags: old.Tags,
			Status: string(reuse.Pending), Created: time.Now(), RestartOf: old.ID}
		old.RestartedAs = id
		if err := r.b.store.WriteBuild(context.Background(), &old); err != nil {
			return err
		}
		r.b.live.add(r, id)
		r.b.live.drop(old.ID)
		r.record = &next
	}
	r.owns, r.ran = a, true
	r.record.Reused = false
	r.setRunLocked(a)
	return nil
}

// setRunLocked puts what is known of the attempt into the record.
func (r *request) setRunLocked(a *attempt) {
	if a.job.mode == nixproto.BuildNormal { // no other run stands in for a check or repair, nor they for it
		r.record.Key = a.key.String()
	}
	r.record.Decisions = r.decisions
}

// handOver gives the record of an attempt whose owner has left to one of those
// who wait.
func (a *attempt) handOver(members []*request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.owner
	if a.ended || len(members) == 0 || slices.Contains(members, old) {
		return
	}
	old.mu.Lock()
	run := *old.record
	old.owns = nil
	old.retireLocked()
	old.mu.Unlock()
	a.owner = members[0]
	a.owner.inherit(a, &run)
}

// handOver is called when the request has left a flight that goes on.
func (r *request) handOver(members []*request) {
	if a := r.owned(); a != nil {
		a.handOver(members)
	}
}

// inherit makes the request the owner of an attempt whose record was another's.
func (r *request) inherit(a *attempt, run *store.Build) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.owns, r.ran = a, true
	b := r.record
	b.Reused = false
	b.Status, b.Started, b.CPUs, b.MemoryMiB, b.DiskMiB, b.Generation = run.Status, run.Started, run.CPUs, run.MemoryMiB, run.DiskMiB, run.Generation
	if b.LogOf = a.logID; b.LogOf == b.ID {
		b.LogOf = 0
	}
	if a.logID != 0 { // it has begun
		r.decisions = append(r.decisions, store.Decision{Check: "resources", Reason: a.whyLocked(r)})
	}
	r.setRunLocked(a)
	if err := r.b.store.WriteBuild(context.Background(), b); err != nil {
		r.b.cfg.Logger.Error("cannot store the record of a build", "build", b.ID, "err", err)
	}
}

// queuedRecord stores that an attempt waits in the queue.
func (b *Builds) queuedRecord(a *attempt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.owner.mu.Lock()
	defer a.owner.mu.Unlock()
	if err := b.store.WriteBuild(context.Background(), a.owner.record); err != nil {
		b.cfg.Logger.Error("cannot store the record of a build", "build", a.owner.record.ID, "err", err)
	}
}

// startRecord says that the attempt runs, in that sandbox generation.
func (b *Builds) startRecord(a *attempt, generation string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.owner
	r.mu.Lock()
	defer r.mu.Unlock()
	a.logID = r.record.ID
	r.record.Status = string(reuse.Running)
	r.record.Started = time.Now()
	r.record.CPUs = a.cpus
	r.record.MemoryMiB, r.record.DiskMiB = a.memoryMiB, a.diskMiB
	r.decisions = append(r.decisions, store.Decision{Check: "resources", Reason: a.whyLocked(r)})
	r.record.Decisions = r.decisions
	r.record.Generation = generation
	if a.before == nil && a.job.mode == nixproto.BuildNormal {
		if err := b.writeRecipe(a); err != nil {
			return err
		}
	}
	return b.store.WriteBuild(context.Background(), r.record)
}

// endRecord says how the attempt ended, and stores what may stand in for other
// runs: both are durable when it returns.
func (b *Builds) endRecord(a *attempt, end *ending) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
	r := a.owner
	r.mu.Lock()
	defer r.mu.Unlock()
	rec := r.record
	r.owns = nil
	rec.Status = string(end.status)
	rec.Error = firstLine(end.message)
	rec.Decisions = r.decisions // the last of them may have come after the flight began
	rec.Stopped = time.Now()
	rec.CPUUser, rec.CPUSystem = end.result.CPUUser, end.result.CPUSystem
	rec.PeakMemory, rec.PeakStorage = end.result.PeakMemory, end.result.PeakScratch
	rec.Outputs = end.outputs
	rec.Network = recordNetwork(end.result.Network)
	booted := rec.Started
	if !end.result.Booted.IsZero() {
		booted = end.result.Booted
	}
	if end.status.Costs() {
		rec.CPUSeconds = cpuSeconds(booted, rec.Stopped, r.pays(rec.CPUs))
	}
	rec.LimitSeconds = limitSeconds(end.status, booted, rec.Stopped, r.pays(rec.CPUs))
	if end.counts {
		rec.LimitSeconds = cpuSeconds(booted, rec.Stopped, r.pays(rec.CPUs))
	}
	if a.log != nil {
		rec.LogSize = a.log.size.Load()
	}
	end.build, end.account = rec.ID, rec.Account
	b.noteRun(a, rec, end)
	// What it cost is also right if the server ends now: it is written with it.
	err := b.store.EndBuild(context.Background(), []*store.Build{rec}, b.stored(a, r, end)...)
	r.retireLocked()
	b.cfg.Logger.Info("build ended", "build", rec.ID, "account", rec.Account, "drv", rec.DrvPath,
		"status", end.status, "time", rec.Stopped.Sub(rec.Created).Round(time.Millisecond), "error", rec.Error)
	return err
}

// pays is for how many of a run's CPUs the account pays: not for what others who
// wait have asked for beyond its own plan. It is called with r.mu held.
func (r *request) pays(cpus int) int { return min(cpus, r.plan.cpus) }

// cpuSeconds is the CPU time of a build: whole seconds, at least 1; 0 if no
// guest was started.
func cpuSeconds(booted, stored time.Time, cpus int) int64 {
	if booted.IsZero() {
		return 0
	}
	return max(1, int64(math.Ceil(stored.Sub(booted).Seconds()*float64(cpus))))
}

// limitSeconds is the CPU time that counts against a monthly limit.
func limitSeconds(s reuse.Status, booted, stored time.Time, cpus int) int64 {
	if !s.Counts() {
		return 0
	}
	return cpuSeconds(booted, stored, cpus)
}

// stored returns what of an end may stand in for other runs. It is called with
// the owner's mu held.
func (b *Builds) stored(a *attempt, owner *request, end *ending) []store.End {
	if a.job.mode != nixproto.BuildNormal {
		return nil
	}
	rec := owner.record
	e := store.End{Key: a.key}
	e.Shared, e.Own = owner.job.set.storedFor(rec.Account)
	if use := end.result.Network; use != nil && use.Private {
		e.Shared, e.Own = false, rec.Account
	}
	e.Usable = owner.session.usable(rec.Account)
	failure := store.Failure{Build: rec.ID, Account: rec.Account, Time: rec.Stopped, Log: end.log,
		Code: end.code, Message: end.message, DrvPath: end.drvPath, MemoryMiB: a.memoryMiB}
	kind, _ := a.job.drv.Kind()
	switch {
	case end.status == reuse.Built:
		e.Success = &store.Result{Build: rec.ID, Account: rec.Account, Time: rec.Stopped, Log: end.log, Outputs: end.results}
	case end.log == 0: // there would be nothing to replay
		return nil
	case end.status == reuse.BuildFailed && kind != nixproto.FixedOutput && rec.Generation != "" &&
		!(end.crashed && b.cfg.Runner.Emulated(a.job.drv.System)):
		e.Failure, e.Generation = &failure, rec.Generation
	case end.status == reuse.Timeout && end.kind != "" && kind != nixproto.FixedOutput:
		e.Timeout, e.Kind = &store.Timeout{Failure: failure, After: end.after}, end.kind
	default:
		return nil
	}
	return []store.End{e}
}
