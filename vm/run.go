package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"nbd/vm/fault"
	"nbd/vm/link"
)

// Run runs spec's build in a new guest and returns when nothing of the guest
// is left. A build that failed is a *BuildError, one that nobody could run a
// *SpecError; any other error is transient. The log's bytes go to log as they
// come: log must not block for long, it holds up the builder. Outputs arrive in
// outs before Run returns; after an error the caller drops them. The Result of a
// build whose guest ran is not nil with an error either: it tells what is known, as
// of a few seconds before a kill.
//
// When ctx ends the guest is killed at once and Run returns ctx's cause.
func (r *Runner) Run(ctx context.Context, spec *Spec, log io.Writer, outs Outputs) (res *Result, err error) {
	if err := spec.check(); err != nil {
		return nil, err
	}
	ctx, leave, err := r.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	base := r.baseOf(spec.Drv.System)
	if base == nil {
		return nil, specErrorf("derivation '%s' is for the system '%s', for which this server has no guests", spec.DrvPath, spec.Drv.System)
	}
	p, err := r.platform(ctx, base)
	if err != nil {
		return nil, err
	}
	order, err := orderBuild(spec, derivationsIn(ctx, r.cfg.Blobs, spec.Inputs))
	if err != nil {
		return nil, fmt.Errorf("order build: %w", err)
	}
	b := &build{r: r, p: p, spec: spec, order: order, log: log, begun: newDone()}
	ctx = b.faulty.begin(ctx, r, order, spec.BuildID)
	defer func() {
		if err = b.end(ctx, err); err != nil && !b.result.Booted.IsZero() {
			b.result.Produced = nil
			res = &b.result
		}
	}()
	if err := b.start(ctx, outs); err != nil {
		return nil, err
	}
	return b.run(ctx)
}

var buildID = regexp.MustCompile(`^[0-9A-Za-z-]{1,64}$`)

// check refuses a Spec that could not be meant.
func (s *Spec) check() error {
	switch {
	case !buildID.MatchString(s.BuildID):
		return fmt.Errorf("bad build id %.80q", s.BuildID)
	case s.Drv == nil || len(s.Drv.InputDrvs) > 0:
		return errors.New("the derivation of a build must be resolved")
	case s.Cores < 1 || s.MemoryMiB < 1 || s.ScratchMiB < 0:
		return errors.New("a build needs processors and memory")
	case s.Timeout < 0 || s.MaxSilent < 0 || s.MaxLog < 0:
		return errors.New("a limit of a build is negative")
	case len(s.Outputs) == 0:
		return errors.New("a build needs outputs")
	}
	return s.checkNetwork()
}

// A build is one Run.
type build struct {
	r     *Runner
	p     *platform
	spec  *Spec
	order *link.BuildOrder
	log   io.Writer

	blobs []Blob
	disks guestDisks
	g     *guestVM

	// begun is closed by the sink when the first byte of an output arrives,
	// which is a sign that the builder has ended.
	begun    chan struct{}
	arriving activity // of outputs

	result Result
	pump   *logPump
	faulty faulty
}

// start makes the disks and starts the guest. Inputs are laid out while the
// guest wakes.
func (b *build) start(ctx context.Context, outs Outputs) error {
	m, err := b.p.machineFor(b.spec)
	if err != nil {
		return err
	}
	if m.kvm = b.order.KVM; m.kvm && !b.p.canNest() {
		return specErrorf("derivation '%s' requires the system feature 'kvm', which the guests of this server do not have", b.spec.DrvPath)
	}
	b.disks = guestDisks{inputs: NewDisk(), network: b.spec.Network, sink: NewSink(SinkConfig{
		Outputs: len(b.spec.Outputs),
		Limit:   b.r.cfg.MaxOutput,
		Create:  func(i int) (OutputWriter, error) { return b.createOutput(ctx, outs, i) },
	})}
	bound := make(chan error, 1)
	layout, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { bound <- b.bindInputs(layout) }()
	b.g, err = b.r.startGuest(ctx, b.p, m, b.disks, b.spec)
	if err != nil {
		cancel()
		<-bound // it opens blobs that end closes
		return err
	}
	b.result.Restored, b.result.Booted = b.g.restored, time.Now()
	b.faulty.proc.Store(b.g.proc)
	b.faulty.at(fault.QEMUStart)
	err = <-bound
	if b.g.network != nil {
		b.order.Network = b.g.network.Guest()
		var noCertificates error
		b.order.Network.Certificates, noCertificates = b.r.cfg.certificates()
		err = errors.Join(err, noCertificates, b.g.plugNetwork(ctx))
	}
	return err
}

// createOutput starts the i-th output.
func (b *build) createOutput(ctx context.Context, outs Outputs, i int) (OutputWriter, error) {
	if i == 0 {
		b.arriving.mark(0)
		close(b.begun)
	}
	w, err := outs.Create(ctx, b.spec.Outputs[i].Name)
	if err != nil {
		return nil, fmt.Errorf("store output %s: %w", b.spec.Outputs[i].Name, err)
	}
	return &markedWriter{b.faulty.output(w), &b.arriving}, nil
}

// A markedWriter notes when bytes arrive.
type markedWriter struct {
	OutputWriter
	at *activity
}

func (w *markedWriter) Write(p []byte) (int, error) {
	w.at.mark(len(p))
	return w.OutputWriter.Write(p)
}

// bindInputs lays the inputs out as a disk.
func (b *build) bindInputs(ctx context.Context) error {
	paths := make([]ImagePath, 0, len(b.spec.Inputs))
	for i := range b.spec.Inputs {
		in := &b.spec.Inputs[i]
		blob, err := b.r.cfg.Blobs.Open(ctx, in.NarHash)
		if err != nil {
			return fmt.Errorf("open input %s: %w", in.Path, err)
		}
		b.blobs = append(b.blobs, blob)
		index, err := blob.Index()
		if err != nil {
			return fmt.Errorf("open input %s: %w", in.Path, err)
		}
		paths = append(paths, ImagePath{Path: in.Path, NAR: blob, Size: blob.Size(), Index: index})
	}
	image, err := NewImage(paths)
	if err != nil {
		return fmt.Errorf("lay out inputs: %w", err)
	}
	return b.disks.inputs.Bind(image, image.Size())
}

// end kills the guest, frees everything and says whose failure err was.
func (b *build) end(ctx context.Context, err error) error {
	if b.g != nil {
		err = b.blame(err)
		if err != nil && b.result.PeakScratch == 0 { // the guest has told nothing
			b.result.PeakScratch = taken(b.g.scratch)
		}
		if cerr := b.g.close(); cerr != nil {
			// The build is not to suffer for it, but an operator wants to know.
			b.r.cfg.Logger.Error("remove guest", "build", b.spec.BuildID, "err", cerr)
		}
		if b.g.network != nil {
			use := b.g.network.Use()
			b.result.Network = &use
		}
	}
	if b.pump != nil {
		<-b.pump.done
	}
	if b.disks.sink != nil {
		b.disks.sink.Close()
	}
	for _, blob := range b.blobs {
		if cerr := blob.Close(); cerr != nil {
			b.r.cfg.Logger.Error("close input", "build", b.spec.BuildID, "err", cerr)
		}
	}
	var failed *BuildError
	if errors.As(err, &failed) {
		b.result.Produced = nil
		failed.Result = b.result
		return failed
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// run gives the order and follows the build to its end.
func (b *build) run(ctx context.Context) (*Result, error) {
	b.pump = startLogPump(b.g.log, b.log, b.spec.MaxLog)
	if err := b.sendOrder(ctx); err != nil {
		return nil, b.g.explain(fmt.Errorf("order build: %w", err))
	}
	frames := make(chan link.Message)
	ended := make(chan error, 1)
	go func() { ended <- b.listen(frames) }()
	result, sent, err := b.follow(ctx, frames, ended)
	if err != nil {
		return nil, err
	}
	b.account(&result.Usage)
	if err := b.waitForLog(ctx, result.LogBytes); err != nil {
		return nil, err
	}
	if err := b.judge(result); err != nil {
		return nil, err
	}
	return b.deliver(sent)
}

// sendOrder sends the order, which the guest may not take.
func (b *build) sendOrder(ctx context.Context) error {
	ctx, stop := b.g.within(ctx, startPatience, "the guest did not take the order in time")
	defer stop()
	return b.g.send(ctx, b.order)
}

// listen passes on what the guest says, until it says no more or the guest is
// closed.
func (b *build) listen(frames chan<- link.Message) error {
	for {
		m, err := b.g.ctl.Receive()
		if err != nil {
			return err
		}
		select {
		case frames <- m:
		case <-b.g.ctx.Done():
			return context.Cause(b.g.ctx)
		}
	}
}

// follow waits for the result of the build, and the outputs that were sent
// before it.
func (b *build) follow(ctx context.Context, frames <-chan link.Message, ended <-chan error) (*link.Result, *link.Outputs, error) {
	f := &following{b: b, w: newWatch(b.faulty.accel(b.g.machine.accel), b.spec, time.Now()), begun: b.begun, began: time.Now()}
	for f.result == nil {
		if err := f.step(ctx, frames, ended); err != nil {
			if b.result.Stop.IsZero() {
				b.result.Stop = time.Now()
			}
			return nil, nil, err
		}
	}
	return f.result, f.sent, nil
}

// A following is the state of follow.
type following struct {
	b      *build
	w      *watch
	began  time.Time
	begun  <-chan struct{} // nil when it was seen
	sent   *link.Outputs
	result *link.Result
	heard  int // messages
}

// maxSaid is how many messages an agent may have sent after some time; each costs
// the host a little. Those of a guest that stood still come at once.
func maxSaid(after time.Duration) int { return 100 + 10*int(after/link.BeatInterval) }

// step waits for one thing to happen. Its error ends the build.
func (f *following) step(ctx context.Context, frames <-chan link.Message, ended <-chan error) error {
	b := f.b
	last, _ := b.pump.get()
	f.w.active = later(f.w.active, last)
	if f.w.phase == phaseSending {
		last, f.w.arrived = b.arriving.get()
		f.w.active = later(f.w.active, last)
	}
	next := f.w.next()
	if !time.Now().Before(next.at) {
		return b.late(next.err)
	}
	timer := time.NewTimer(time.Until(next.at))
	defer timer.Stop()
	_, pumped, logMoved := b.pump.state()
	if err := b.logFailure(pumped); err != nil {
		return err
	}
	select {
	case m := <-frames:
		return f.hear(m)
	case <-f.begun:
		f.begun = nil
		b.result.Stop = time.Now()
		f.w.enter(phaseSending, b.result.Stop)
	case <-logMoved:
	case e, ok := <-b.g.qmp.events:
		if !ok {
			return b.g.explain(fmt.Errorf("the guest ended without a result: %w", b.g.qmp.err))
		}
		if err := event(e); err != nil {
			return b.g.explain(b.whyHostDisk(err))
		}
	case <-b.disks.inputs.Failed():
		return b.disks.inputs.Err()
	case <-b.disks.sink.Failed():
		return b.disks.sink.Err()
	case err := <-ended:
		return b.g.explain(fmt.Errorf("the guest ended without a result: %w", err))
	case <-timer.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// hear takes one message of the guest.
func (f *following) hear(m link.Message) error {
	if f.b.faulty.deaf(m) {
		return nil
	}
	now := time.Now()
	if f.heard++; f.heard > maxSaid(now.Sub(f.began)) {
		return errors.New("the guest's agent says more than it has to")
	}
	f.w.beat = now
	switch m := m.(type) {
	case *link.Beat:
		if m.Usage != nil {
			f.b.account(m.Usage)
		}
		return f.b.checkHostDisk()
	case *link.Started:
		if !f.b.result.Start.IsZero() {
			return errors.New("the guest's agent said twice that the builder runs")
		}
		f.w.enter(phaseRunning, now)
		f.b.faulty.at(fault.QEMURun, fault.QEMUStop)
		f.b.result.Start = now
	case *link.Outputs:
		if f.b.result.Start.IsZero() || f.sent != nil {
			return errors.New("the guest's agent told of outputs out of turn")
		}
		f.w.enter(phaseSending, now)
		f.sent = m
	case *link.Result:
		if f.b.result.Stop.IsZero() {
			f.b.result.Stop = now
		}
		f.result = m
	default:
		return fmt.Errorf("the guest's agent said %T out of turn", m)
	}
	return nil
}

// account takes over what the guest has counted so far. The guest is not trusted:
// what it says counts as far as it can be.
func (b *build) account(u *link.Usage) {
	most := time.Since(b.result.Booted) * time.Duration(b.spec.Cores)
	b.result.CPUUser, b.result.CPUSystem = min(max(u.CPUUser, 0), most), min(max(u.CPUSystem, 0), most)
	b.result.PeakMemory = min(max(u.PeakMemory, b.result.PeakMemory), int64(b.spec.MemoryMiB)<<20)
	b.result.PeakScratch = min(max(u.PeakScratch, b.result.PeakScratch), int64(b.g.machine.scratchGiB)<<30)
}

// waitForLog waits until the pump has copied as much as the guest has written.
func (b *build) waitForLog(ctx context.Context, size int64) error {
	deadline := time.NewTimer(patience(b.g.machine.accel, logPatience))
	defer deadline.Stop()
	for {
		copied, err, moved := b.pump.state()
		if failed := b.logFailure(err); failed != nil {
			return failed
		}
		switch {
		case copied >= size:
			return nil
		case err != nil:
			return b.g.explain(fmt.Errorf("the guest ended before its log was complete: %w", err))
		}
		select {
		case <-moved:
		case <-deadline.C:
			return errors.New("the rest of the build's log did not arrive in time")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
