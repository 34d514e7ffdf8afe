package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/store"
	"nbd/vm"
)

// A produced takes the outputs of one run as NARs from the guest, stores them
// without making them valid, and finds their references in the same pass. It
// implements vm.Outputs and is used by one goroutine at a time.
type produced struct {
	store *store.Store
	outs  map[string]*producedOutput
	// candidates are what an output can refer to: the inputs' closure and the
	// outputs themselves, where the builder sees them.
	candidates []nixproto.StorePath
	// entries is how many files and folders may still come: what is known of
	// them is in memory until all outputs are registered.
	entries int
}

// A producedOutput is one output of a run.
type producedOutput struct {
	name    string
	account store.AccountID // whose build it is
	// seen is the path at which the builder makes it: the final one if that is
	// known, else a scratch path.
	seen    nixproto.StorePath
	staged  *store.Staged // nil until it arrives
	scanner *nixproto.Scanner
	// discard says that references are not looked for (unsafeDiscardReferences).
	discard bool
}

// newProduced prepares for the outputs of an attempt.
func (b *Builds) newProduced(a *attempt) (*produced, error) {
	j := a.job
	attrs, err := attrsOf(j.drv)
	if err != nil {
		return nil, err
	}
	discard, err := attrs.object("unsafeDiscardReferences")
	if err != nil {
		return nil, err
	}
	p := &produced{store: b.store, outs: make(map[string]*producedOutput, len(j.drv.Outputs)), entries: nar.DefaultEntries}
	for i := range a.closure {
		p.candidates = append(p.candidates, a.closure[i].Path)
	}
	scratchDrv := j.drvPath
	if j.scratchDrv != "" {
		scratchDrv = j.scratchDrv
	}
	for name, out := range j.drv.Outputs {
		seen := out.Path
		if seen == "" {
			if seen, err = nixproto.ScratchPath(scratchDrv, name); err != nil {
				return nil, err
			}
		}
		p.outs[name] = &producedOutput{name: name, account: j.account, seen: seen, discard: string(discard[name]) == "true"}
		p.candidates = append(p.candidates, seen)
	}
	return p, nil
}

// spec is what the guest is given.
func (p *produced) spec(b *Builds, a *attempt) *vm.Spec {
	j := a.job
	spec := &vm.Spec{
		BuildID:    fmt.Sprint(a.logID),
		DrvPath:    j.drvPath,
		Inputs:     a.closure,
		Network:    b.networkFor(j),
		Cores:      a.cpus,
		MemoryMiB:  a.memoryMiB,
		ScratchMiB: a.diskMiB,
		Timeout:    a.limits.Timeout,
		MaxSilent:  a.limits.MaxSilent,
		MaxLog:     a.limits.MaxLogSize,
	}
	var own []string // placeholders and what they stand for
	for _, name := range j.drv.OutputNames() {
		spec.Outputs = append(spec.Outputs, vm.Output{Name: name, Path: p.outs[name].seen})
		own = append(own, nixproto.Placeholder(name), string(p.outs[name].seen))
	}
	spec.Drv = withReplaced(j.drv, strings.NewReplacer(own...))
	return spec
}

// withReplaced returns a copy of drv in which strings that its builder sees are
// replaced.
func withReplaced(drv *nixproto.Derivation, r *strings.Replacer) *nixproto.Derivation {
	c := *drv
	c.Builder = r.Replace(drv.Builder)
	c.Args = make([]string, len(drv.Args))
	for i, a := range drv.Args {
		c.Args[i] = r.Replace(a)
	}
	c.Env = make(map[string]string, len(drv.Env))
	for name, value := range drv.Env {
		c.Env[name] = r.Replace(value)
	}
	return &c
}

// Create implements vm.Outputs.
func (p *produced) Create(ctx context.Context, name string) (vm.OutputWriter, error) {
	out := p.outs[name]
	if out == nil || out.staged != nil {
		return nil, fmt.Errorf("take output %q: not expected", name)
	}
	staged, err := p.store.Stage(ctx, out.account)
	if err != nil {
		return nil, fmt.Errorf("take output %q: %w", name, err)
	}
	out.staged = staged
	if !out.discard {
		out.scanner = nixproto.NewScanner(p.candidates)
	}
	return &outputWriter{p, out}, nil
}

// discard drops what was not registered.
func (p *produced) discard() {
	for _, out := range p.outs {
		if out.staged != nil {
			out.staged.Discard()
		}
	}
}

// missing returns the names of outputs that did not arrive.
func (p *produced) missing() []string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(p.outs)) {
		if p.outs[name].staged == nil {
			names = append(names, name)
		}
	}
	return names
}

// An outputWriter takes the NAR of one output.
type outputWriter struct {
	p   *produced
	out *producedOutput
}

func (w *outputWriter) Write(b []byte) (int, error) {
	n, err := w.out.staged.Write(b)
	if w.out.scanner != nil {
		w.out.scanner.Write(b[:n])
	}
	return n, outputFault(err)
}

func (w *outputWriter) Close() error {
	if err := w.out.staged.Finish(); err != nil {
		return outputFault(err)
	}
	if w.p.entries -= len(w.out.staged.Index()); w.p.entries < 0 {
		return &vm.OutputError{Err: fmt.Errorf("the outputs of one build have more than %d files and folders", nar.DefaultEntries)}
	}
	return nil
}

func (w *outputWriter) Abort() {
	w.out.staged.Discard()
	w.out.staged = nil
}

// outputFault marks errors about the bytes of an output as the build's.
func outputFault(err error) error {
	if errors.Is(err, store.ErrInvalid) {
		return &vm.OutputError{Err: err}
	}
	return err
}

// references returns the paths that the output refers to, as the builder saw
// them.
func (o *producedOutput) references() []nixproto.StorePath {
	if o.scanner == nil {
		return nil
	}
	return o.scanner.Found()
}

// reader reads the output's NAR from its beginning.
func (o *producedOutput) reader() io.Reader {
	return io.NewSectionReader(o.staged, 0, int64(o.staged.NarSize()))
}

// inOrder returns the outputs of a build, each after those that it refers to;
// a circle is the build's fault.
func (p *produced) inOrder(drv nixproto.StorePath) ([]*producedOutput, error) {
	bySeen := make(map[nixproto.StorePath]*producedOutput, len(p.outs))
	for _, out := range p.outs {
		bySeen[out.seen] = out
	}
	users := make(map[*producedOutput][]*producedOutput)
	waits := make(map[*producedOutput]int)
	var ready, order []*producedOutput
	for _, name := range slices.Sorted(maps.Keys(p.outs)) {
		out := p.outs[name]
		for _, r := range out.references() {
			if sibling := bySeen[r]; sibling != nil && sibling != out {
				users[sibling] = append(users[sibling], out)
				waits[out]++
			}
		}
		if waits[out] == 0 {
			ready = append(ready, out)
		}
	}
	for len(ready) > 0 {
		out := ready[0]
		ready = ready[1:]
		order = append(order, out)
		for _, user := range users[out] {
			if waits[user]--; waits[user] == 0 {
				ready = append(ready, user)
			}
		}
	}
	if len(order) == len(p.outs) {
		return order, nil
	}
	var circle []string
	for _, name := range slices.Sorted(maps.Keys(p.outs)) {
		if waits[p.outs[name]] > 0 {
			circle = append(circle, "'"+name+"'")
		}
	}
	return nil, rejectf("cycle detected in build of '%s': its outputs %s refer to one another", drv, strings.Join(circle, ", "))
}
