package server

import (
	"context"
	"fmt"
	"slices"

	"nbd/vm"
)

// An offering is what builds of this server may ask for now.
type offering struct {
	systems, features []string
	// lacks says of systems and features that guests could have why these have
	// not, in words for a client: a relative clause.
	lacks map[string]string
}

// ownFeatures are the features that do not depend on what guests can do.
var ownFeatures = []string{"big-parallel", "benchmark", "ca-derivations"}

// offered returns what is offered now.
func (b *Builds) offered() offering {
	o := offering{features: slices.Clone(ownFeatures), lacks: map[string]string{}}
	for _, s := range b.cfg.Runner.Systems() {
		o.note(&o.systems, s.Name, s.Offered, s.SwitchedOff, "which is not set up on this server (`nbd doctor`, run there, says how)")
	}
	for _, f := range b.cfg.Runner.Features() {
		o.note(&o.features, f.Name, f.Offered, f.SwitchedOff, "which the guests of this server do not have (`nbd doctor`, run there, says why)")
	}
	return o
}

// note adds to a list what is offered, else says why it is not.
func (o *offering) note(list *[]string, name string, offered, off bool, why string) {
	switch {
	case offered:
		*list = append(*list, name)
	case off:
		o.lacks[name] = "which is switched off on this server"
	default:
		o.lacks[name] = why
	}
}

// offeredTo returns what is offered to who requires a feature of guests. If that is
// not known yet it is found out first: after a start that takes a moment. Its
// errors are ctx's.
func (b *Builds) offeredTo(ctx context.Context, feature string) (offering, error) {
	unknown := func(f vm.Feature) bool { return f.Unknown && f.Name == feature }
	if slices.ContainsFunc(b.cfg.Runner.Features(), unknown) {
		if _, err := b.cfg.Runner.Qualify(ctx, false); ctx.Err() != nil {
			return offering{}, context.Cause(ctx)
		} else if err != nil {
			b.cfg.Logger.Warn("what guests can do is not known; features are not offered", "err", err)
		}
	}
	return b.offered(), nil
}

// lack says why something is not to be had, and what is.
func (o offering) lack(name, others string, have []string) string {
	text := fmt.Sprintf(others, listed(have))
	if why := o.lacks[name]; why != "" {
		text = why + ", " + text
	}
	return text
}
