package server

import (
	"context"
	"fmt"
	"slices"

	"nbd/nixproto"
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
		switch {
		case s.Offered:
			o.systems = append(o.systems, s.Name)
		case s.SwitchedOff:
			o.lacks[s.Name] = "which is switched off on this server"
		default:
			o.lacks[s.Name] = "which is not set up on this server (`nbd doctor`, run there, says how)"
		}
	}
	for _, f := range b.cfg.Runner.Features() {
		switch {
		case f.Offered:
			o.features = append(o.features, f.Name)
		case f.SwitchedOff:
			o.lacks[f.Name] = "which is switched off on this server"
		default:
			o.lacks[f.Name] = "which the guests of this server do not have (`nbd doctor`, run there, says why)"
		}
	}
	return o
}

// offeredTo returns what is offered, found out first if drv requires what is not
// known yet: after a start that takes a moment.
func (b *Builds) offeredTo(ctx context.Context, drv *nixproto.Derivation) (offering, error) {
	for _, f := range b.cfg.Runner.Features() {
		if !f.Unknown || !requires(drv, f.Name) {
			continue
		}
		if _, err := b.cfg.Runner.Qualify(ctx, false); ctx.Err() != nil {
			return offering{}, context.Cause(ctx)
		} else if err != nil {
			b.cfg.Logger.Warn("what guests can do is not known; features are not offered", "err", err)
		}
		break
	}
	return b.offered(), nil
}

// requires reports whether a derivation requires a feature.
func requires(drv *nixproto.Derivation, feature string) bool {
	attrs, err := attrsOf(drv)
	if err != nil {
		return false // it is refused for that
	}
	required, err := attrs.strings("requiredSystemFeatures")
	return err == nil && slices.Contains(required, feature)
}

// lack says why something is not to be had, and what is.
func (o offering) lack(name, others string, have []string) string {
	text := fmt.Sprintf(others, listed(have))
	if why := o.lacks[name]; why != "" {
		text = why + ", " + text
	}
	return text
}
