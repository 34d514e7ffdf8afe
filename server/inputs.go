package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
)

// What a request knows of its inputs and outputs before anything runs is in this
// file.

// jobInputs are the inputs of a job, held for it.
type jobInputs struct {
	key   reuse.Key
	lease *store.Lease
}

// inputs finds the inputs of j, brings from caches what is missing, and
// computes the key, or names the inputs that are not there. The caller releases
// the lease unless there was an error or something is missing.
func (b *Builds) inputs(ctx context.Context, s *Session, j *job, log LogSink) (in *jobInputs, missing []nixproto.StorePath, err error) {
	lease := s.Sight.NewLease()
	defer func() {
		if in == nil {
			lease.Release()
		}
	}()
	lease.Add(j.drv.InputSrcs...)
	if err := b.fetchInputs(ctx, s, j, log); err != nil {
		return nil, nil, err
	}
	valid, err := s.Sight.Valid(ctx, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	if len(valid) < len(j.drv.InputSrcs) {
		return nil, without(j.drv.InputSrcs, valid), nil
	}
	_, roots, err := s.Sight.InputRoots(ctx, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	key, err := j.keyOf(reuse.KeyOfRoots(j.drv, roots))
	if err != nil {
		return nil, nil, err
	}
	return &jobInputs{key, lease}, nil, nil
}

// keyOf is the key of the job whose derivation and inputs have a key.
func (j *job) keyOf(key reuse.Key, err error) (reuse.Key, error) {
	if kind, _ := j.drv.Kind(); err == nil && j.beforeSelfHash && kind == nixproto.Floating {
		key = key.Variant("content addresses of Nix before 2.17")
	}
	return key, err
}

// knownPaths are the paths of a job's outputs as far as they are known and
// valid.
type knownPaths struct {
	paths    map[string]nixproto.StorePath
	complete bool // all outputs are valid
}

// knownOutputs finds which outputs of j are valid, and keeps those for the
// session.
func (b *Builds) knownOutputs(ctx context.Context, s *Session, j *job) (*knownPaths, error) {
	return b.findOutputs(ctx, s, j.drv, j.hash, j.resolved)
}

// findOutputs finds which outputs of drv are valid in the session's view, and
// keeps those. The paths of outputs that are not static are looked up under
// the hashes given; zero ones stand for nothing.
func (b *Builds) findOutputs(ctx context.Context, s *Session, drv *nixproto.Derivation, hashes ...nixproto.Hash) (*knownPaths, error) {
	paths := make(map[string]nixproto.StorePath)
	for name, out := range drv.Outputs {
		if out.Path != "" {
			paths[name] = out.Path
			continue
		}
		for _, hash := range hashes {
			if hash.IsZero() {
				continue
			}
			real, err := s.Sight.Realisation(ctx, hash, name)
			if errors.Is(err, store.ErrNotFound) {
				continue
			} else if err != nil {
				return nil, err
			}
			paths[name] = real.OutPath
			break
		}
	}
	wanted := slices.Sorted(maps.Values(paths))
	s.Keep(wanted...)
	valid, err := s.Sight.Valid(ctx, wanted)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(paths, func(_ string, p nixproto.StorePath) bool { return !slices.Contains(valid, p) })
	return &knownPaths{paths, len(paths) == len(drv.Outputs)}, nil
}

// staticOutputs returns the output paths of drv that are known beforehand.
func staticOutputs(drv *nixproto.Derivation) []nixproto.StorePath {
	var paths []nixproto.StorePath
	for _, name := range drv.OutputNames() {
		if p := drv.Outputs[name].Path; p != "" {
			paths = append(paths, p)
		}
	}
	return paths
}

// without returns the members of all that are not in some, sorted.
func without(all, some []nixproto.StorePath) []nixproto.StorePath {
	have := make(map[nixproto.StorePath]bool, len(some))
	for _, p := range some {
		have[p] = true
	}
	var rest []nixproto.StorePath
	for _, p := range all {
		if !have[p] {
			rest = append(rest, p)
		}
	}
	slices.Sort(rest)
	return slices.Compact(rest)
}

// missingInputs is the message about inputs that are not valid; it names a few.
func missingInputs(drv nixproto.StorePath, missing []nixproto.StorePath) string {
	const most = 10
	var text strings.Builder
	fmt.Fprintf(&text, "cannot build '%s': these inputs are not valid in your store on this server:", drv)
	for _, p := range missing[:min(most, len(missing))] {
		fmt.Fprintf(&text, "\n  %s", p)
	}
	if more := len(missing) - most; more > 0 {
		fmt.Fprintf(&text, "\n  and %d more", more)
	}
	return text.String()
}
