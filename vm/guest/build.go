package guest

import (
	"context"
	"errors"
	"io"
	"runtime/debug"
	"sync/atomic"

	"nbd/vm/link"
)

// A build is the one build of a guest.
type build struct {
	kit   *kit
	order *link.BuildOrder
	conn  *link.Conn
	log   io.Writer
	used  *atomic.Pointer[link.Usage] // for beats; nothing before it runs
}

// run runs the build in the guest's own surroundings and returns its result.
func (b *build) run() *link.Result {
	r := &link.Result{}
	if err := b.inGuest(r); err != nil {
		judge(r, err)
	}
	return r
}

// judge says in r whose failure an error is.
func judge(r *link.Result, err error) {
	var bad *outputError
	if errors.As(err, &bad) {
		r.Kind, r.Message = bad.kind, bad.msg
	} else {
		r.Kind, r.Message = link.Internal, err.Error()
	}
}

// inGuest does everything between order and result. Its error is an
// *outputError or our own failure.
func (b *build) inGuest(r *link.Result) error {
	disks, err := watchIOErrors()
	if err != nil {
		return err
	}
	if len(b.order.Inputs) > 0 {
		if err := b.kit.mountInputs(); err != nil {
			return err
		}
	}
	st := b.kit.stage
	if err := st.furnish(inputDir, b.order); err != nil {
		return err
	}
	if err := b.startNetwork(); err != nil {
		return err
	}
	b.dropFiles()
	limit, err := memoryLimit(b.order.MemoryMiB)
	if err != nil {
		return err
	}
	group := b.kit.group
	if err := group.begin(limit, b.order.MaxProcesses, b.order.CPUs); err != nil {
		return err
	}
	// A build that met its limit of processes, or has filled its disk, has failed,
	// whatever it makes of that: it would perhaps go on for ever.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	unwatch, err := group.onProcessLimit(cancel)
	if err != nil {
		return err
	}
	looks := startSampler(group, func() (diskUse, error) { return useOfDisk(scratchDir) }, cancel, b.used)
	started := func() error { return b.conn.Send(&link.Started{}) }
	var runErr error
	if b.order.Unconfined {
		runErr = runUnconfined(ctx, b.order, b.log, started, r)
	} else {
		runErr = b.kit.sandbox.run(ctx, st, b.order, b.log, started, r)
	}
	if err := errors.Join(runErr, unwatch(), b.account(r, group, looks, disks)); err != nil {
		return err
	}
	if r.Kind != link.Exited || r.ExitStatus != 0 {
		return nil
	}
	return b.sendOutputs(st)
}

// dropFiles frees the files of the order, which are not needed again, if that
// is worth a collection of garbage.
func (b *build) dropFiles() {
	const worth = 4 << 20
	size := 0
	for _, f := range b.order.Files {
		size += len(f.Data)
	}
	b.order.Files = nil
	if size > worth {
		debug.FreeOSMemory()
	}
}

// account fills in what the build has used and met.
func (b *build) account(r *link.Result, group *cgroup, looks *sampler, disks *ioErrors) (err error) {
	if r.Usage, r.DiskFull, err = looks.stop(); err != nil {
		return err
	}
	u, err := group.usage()
	if err != nil {
		return err
	}
	r.OOMKills, r.ProcessLimit = u.oomKills, u.processLimit
	r.IOErrors, err = disks.seen()
	return err
}

func (b *build) sendOutputs(st *stage) error {
	if err := checkOutputs(st.root(), b.order, builderUID); err != nil {
		return err
	}
	s, err := openSink(b.kit.disks[link.OutputSerial])
	if err != nil {
		return err
	}
	infos, err := sendOutputs(s, st.root(), b.order, builderUID)
	if err := errors.Join(err, s.close()); err != nil {
		return err
	}
	return b.conn.Send(&link.Outputs{Outputs: infos})
}
