package server

import (
	"context"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// newRecord stores the record of an attempt that will wait in the queue, and
// links it with that of the attempt it repeats.
func (b *Builds) newRecord(ctx context.Context, j *job, in *jobInputs, a *attempt) error {
	a.record = &store.Build{
		Account: j.account,
		DrvPath: j.drvPath,
		Name:    j.drv.Name,
		System:  j.drv.System,
		Status:  string(reuse.Pending),
		Created: time.Now(),
	}
	if j.mode == nixproto.BuildNormal { // no other run stands in for a check or repair, nor they for it
		a.record.Key = in.key.String()
	}
	if a.before != nil {
		a.record.RestartOf = a.before.ID
	}
	if err := b.store.NewBuild(ctx, a.record); err != nil {
		return err
	}
	if a.before == nil {
		return nil
	}
	a.before.RestartedAs = a.record.ID
	return b.store.WriteBuild(ctx, a.before)
}

// startRecord says that the attempt runs.
func (b *Builds) startRecord(ctx context.Context, a *attempt) error {
	a.record.Status = string(reuse.Running)
	a.record.Started = time.Now()
	a.record.CPUs = b.cfg.CPUs
	a.record.MemoryMiB = a.memoryMiB
	a.record.Generation = b.cfg.Runner.Generation()
	return b.store.WriteBuild(ctx, a.record)
}

// endRecord says how the attempt ended.
func (b *Builds) endRecord(a *attempt, end *ending, outputs []store.BuildOutput) error {
	ctx := context.Background() // it is told however the flight ended
	r := a.record
	r.Status = string(end.status)
	r.Error, _, _ = strings.Cut(end.message, "\n")
	r.Error = strings.TrimRight(r.Error, ";:")
	r.Stopped = time.Now()
	r.CPUUser, r.CPUSystem = end.result.CPUUser, end.result.CPUSystem
	r.PeakMemory, r.PeakStorage = end.result.PeakMemory, end.result.PeakScratch
	r.Outputs = outputs
	if a.log != nil {
		r.LogSize = a.log.size.Load()
	}
	return b.store.EndBuild(ctx, []*store.Build{r})
}
