package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"

	"nbd/nixproto"
)

// maxParallel bounds how many builds of one request are under way or in the
// queue at once; the rest waits here, without taking part in the queue.
const maxParallel = 64

// run builds what has to be built, dependencies first.
func (g *graph) run(ctx context.Context, log LogSink) error {
	var ready []*node
	expected := uint64(0)
	for _, n := range g.nodes {
		if !n.build {
			n.done = true
			continue
		}
		expected++
	}
	for _, n := range g.nodes {
		if n.build && g.link(n) {
			ready = append(ready, n)
		}
	}
	if expected == 0 {
		return nil
	}
	slices.SortFunc(ready, func(a, b *node) int { return cmp.Compare(a.path, b.path) })

	type outcome struct {
		n   *node
		err error
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	outcomes := make(chan outcome)
	var fault error
	var finished, failures, running uint64
	for {
		for len(ready) > 0 && running < uint64(g.most) && fault == nil {
			n := ready[0]
			ready = ready[1:]
			if !g.startable(n) {
				finished, failures = finished+1, failures+1
				ready = append(ready, n.finish()...)
				continue
			}
			running++
			go func() {
				o := outcome{n: n}
				defer func() {
					if p := recover(); p != nil { // as in session.run
						o.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
					}
					outcomes <- o
				}()
				n.result, o.err = g.buildNode(ctx, n, log)
			}()
		}
		if running == 0 {
			break
		}
		log.Progress(finished, expected, running, failures)
		o := <-outcomes
		running--
		if o.err != nil {
			if fault == nil {
				fault = o.err
				cancel(fault)
			}
			continue
		}
		finished++
		if !o.n.result.Status.Success() {
			failures++
		}
		ready = append(ready, o.n.finish()...)
	}
	if fault != nil {
		return fault
	}
	log.Progress(finished, expected, 0, failures)
	return nil
}

// link makes n a user of what it depends on, and reports whether it waits for
// nothing.
func (g *graph) link(n *node) (ready bool) {
	if n.result != nil { // refused
		return true
	}
	for _, dep := range n.deps {
		switch {
		case dep.build:
			dep.users = append(dep.users, n)
			n.waits++
		case dep.result != nil:
			n.failed = dep
			n.broken++
		}
	}
	return n.waits == 0
}

// startable reports whether n can be built; if not it has a result then.
func (g *graph) startable(n *node) bool {
	if n.result != nil {
		return false
	}
	if n.failed == nil {
		return true
	}
	what := "1 dependency"
	if n.broken > 1 {
		what = fmt.Sprintf("%d dependencies", n.broken)
	}
	n.result = failed(nixproto.DependencyFailed, refusef("cannot build '%s': %s failed, for example '%s':\n%s",
		n.path, what, n.failed.path, firstCause(n.failed)))
	return false
}

// firstCause returns the message of the dependency that a failure began with.
func firstCause(n *node) string {
	for n.failed != nil {
		n = n.failed
	}
	return n.result.Error
}

// finish tells the users of n that it is done, and returns those that can go on.
func (n *node) finish() (ready []*node) {
	n.done = true
	if n.result.Status.Success() {
		n.paths = make(map[string]nixproto.StorePath, len(n.result.Outputs))
		for name, real := range n.result.Outputs {
			n.paths[name] = real.OutPath
		}
	}
	for _, user := range n.users {
		if !n.result.Status.Success() {
			user.failed = n
			user.broken++
		}
		if user.waits--; user.waits == 0 {
			ready = append(ready, user)
		}
	}
	return ready
}

// buildNode builds a node whose dependencies are valid.
func (g *graph) buildNode(ctx context.Context, n *node, log LogSink) (*nixproto.BuildResult, error) {
	static := true
	drv, err := n.drv.Resolve(func(path nixproto.StorePath, name string) (nixproto.StorePath, error) {
		dep := g.nodes[path]
		static = static && !floats(dep.drv)
		if p := dep.paths[name]; p != "" {
			return p, nil
		}
		return "", refusef("'%s' has no output '%s'", path, name)
	})
	if err != nil {
		return failed(nixproto.InputRejected, err), nil
	}
	set, err := g.b.policy(g.s, n.drv, g.sent)
	if err != nil {
		return failed(nixproto.InputRejected, err), nil
	}
	j := &job{account: g.s.account(), drvPath: n.path, drv: drv, set: set, sent: g.sent, hash: n.hash,
		beforeSelfHash: g.s.beforeSelfHash}
	if n.top {
		j.mode = g.mode
	}
	if floats(n.drv) || !static {
		if j.resolved, err = nixproto.NewModulo(nil).RealisationHash(drv); err == nil {
			j.scratchDrv, err = drv.DrvPath()
		}
		if err != nil {
			return failed(nixproto.InputRejected, err), nil
		}
	}
	if err := checkShape(n.path, drv); err != nil {
		return failed(nixproto.InputRejected, refusef("cannot build '%s': %v", n.path, err)), nil
	}
	n.asked = true
	result, err := g.b.build(ctx, g.s, j, log)
	if errors.Is(err, errEnding) { // the others, which run already, go on
		return failed(nixproto.TransientFailure, fmt.Errorf("cannot build '%s': %w", n.path, err)), nil
	}
	if err != nil || result.Status != nixproto.AlreadyValid || j.resolved.IsZero() || !floats(n.drv) {
		return result, err
	}
	// Another derivation resolved to the same one and was built: that is true of
	// this one too.
	paths := make(map[string]nixproto.StorePath, len(result.Outputs))
	for name, real := range result.Outputs {
		paths[name] = real.OutPath
	}
	result.Status = nixproto.ResolvesToAlreadyValid
	return result, g.b.realise(ctx, j, paths)
}
