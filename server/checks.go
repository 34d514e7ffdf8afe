package server

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"nbd/nixproto"
)

// An outputCheck is what a derivation demands of one of its outputs. A nil list
// demands nothing; of the allowed ones an empty list allows nothing.
type outputCheck struct {
	maxSize, maxClosureSize                *uint64
	allowedReferences, allowedRequisites   []string
	disallowedReferences, disallowedClosed []string
	// ignoreSelf leaves the output itself out of its requisites.
	ignoreSelf bool
}

// outputChecksOf returns the checks of a derivation for each of its outputs:
// those of outputChecks with structured attributes, else those of the
// variables, which hold for all outputs.
func outputChecksOf(drv *nixproto.Derivation) (map[string]outputCheck, error) {
	attrs, err := attrsOf(drv)
	if err != nil {
		return nil, err
	}
	checks := make(map[string]outputCheck)
	if attrs.structured == nil {
		c := outputCheck{
			allowedReferences:    variableList(drv, "allowedReferences"),
			allowedRequisites:    variableList(drv, "allowedRequisites"),
			disallowedReferences: variableList(drv, "disallowedReferences"),
			disallowedClosed:     variableList(drv, "disallowedRequisites"),
			ignoreSelf:           true,
		}
		for name := range drv.Outputs {
			checks[name] = c
		}
		return checks, nil
	}
	perOutput, err := attrs.object("outputChecks")
	if err != nil {
		return nil, err
	}
	for name, raw := range perOutput {
		var c struct {
			MaxSize              *uint64  `json:"maxSize"`
			MaxClosureSize       *uint64  `json:"maxClosureSize"`
			AllowedReferences    []string `json:"allowedReferences"`
			AllowedRequisites    []string `json:"allowedRequisites"`
			DisallowedReferences []string `json:"disallowedReferences"`
			DisallowedRequisites []string `json:"disallowedRequisites"`
			IgnoreSelfRefs       bool     `json:"ignoreSelfRefs"`
		}
		if err := json.Unmarshal(raw, &c); err != nil {
			return nil, fmt.Errorf("its outputChecks of output '%s' are not as they should be", name)
		}
		checks[name] = outputCheck{c.MaxSize, c.MaxClosureSize, c.AllowedReferences, c.AllowedRequisites,
			c.DisallowedReferences, c.DisallowedRequisites, c.IgnoreSelfRefs}
	}
	return checks, nil
}

// variableList returns the words of a variable: nil if it is not set, never nil
// if it is.
func variableList(drv *nixproto.Derivation, name string) []string {
	value, ok := drv.Env[name]
	if !ok {
		return nil
	}
	return append([]string{}, strings.Fields(value)...)
}

// checkOutputs applies the checks of a job's derivation to its new outputs.
// Known is what they can refer to beside one another.
func checkOutputs(j *job, known []nixproto.PathInfo, outs []*settled) error {
	checks, err := outputChecksOf(j.drv)
	if err != nil {
		return rejectf("derivation '%s': %v", j.drvPath, err)
	}
	c := &outputChecker{job: j, infos: make(map[nixproto.StorePath]*nixproto.PathInfo), outputs: make(map[string]nixproto.StorePath)}
	for i := range known {
		c.infos[known[i].Path] = &known[i]
	}
	for _, out := range outs {
		c.infos[out.info.Path] = &out.info
		c.outputs[out.name] = out.info.Path
		if out.staged != nil {
			c.outputs[string(out.staged.seen)] = out.info.Path
		}
	}
	for _, out := range outs {
		if check, ok := checks[out.name]; ok && !out.old {
			if err := c.check(out, check); err != nil {
				return err
			}
		}
	}
	return nil
}

// An outputChecker knows everything that an output can refer to.
type outputChecker struct {
	job   *job
	infos map[nixproto.StorePath]*nixproto.PathInfo
	// outputs are the paths of outputs by name, placeholder and scratch path.
	outputs map[string]nixproto.StorePath
}

func (c *outputChecker) check(out *settled, check outputCheck) error {
	info := &out.info
	if check.maxSize != nil && info.NarSize > *check.maxSize {
		return rejectf("path '%s' is too large at %d bytes; limit is %d bytes", info.Path, info.NarSize, *check.maxSize)
	}
	closure, size := []nixproto.StorePath(nil), uint64(0)
	if check.maxClosureSize != nil || check.allowedRequisites != nil || len(check.disallowedClosed) > 0 {
		var err error
		if closure, size, err = c.closure(info.Path); err != nil {
			return err
		}
	}
	if check.maxClosureSize != nil && size > *check.maxClosureSize {
		return rejectf("closure of path '%s' is too large at %d bytes; limit is %d bytes", info.Path, size, *check.maxClosureSize)
	}
	if check.ignoreSelf {
		closure = slices.DeleteFunc(closure, func(p nixproto.StorePath) bool { return p == info.Path })
	}
	for _, rule := range []struct {
		specs   []string
		used    []nixproto.StorePath
		allowed bool
	}{
		{check.allowedReferences, info.References, true},
		{check.allowedRequisites, closure, true},
		{check.disallowedReferences, info.References, false},
		{check.disallowedClosed, closure, false},
	} {
		if rule.specs == nil {
			continue
		}
		if err := c.checkPaths(out, rule.specs, rule.used, rule.allowed); err != nil {
			return err
		}
	}
	return nil
}

// checkPaths says which of the used paths are not among those allowed, or are
// among those that are not.
func (c *outputChecker) checkPaths(out *settled, specs []string, used []nixproto.StorePath, allowed bool) error {
	listed := make(map[nixproto.StorePath]bool, len(specs))
	for _, spec := range specs {
		p, err := c.path(spec)
		if err != nil {
			return rejectf("derivation '%s': check of output '%s': %v", c.job.drvPath, out.name, err)
		}
		listed[p] = true
	}
	var bad []string
	for _, p := range used {
		if listed[p] != allowed {
			bad = append(bad, string(p))
		}
	}
	if len(bad) == 0 {
		return nil
	}
	slices.Sort(bad)
	return rejectf("output '%s' is not allowed to refer to the following paths:\n  %s", out.info.Path, strings.Join(bad, "\n  "))
}

// path returns the store path that a word of a check stands for: an output's
// name, or a path or something below one.
func (c *outputChecker) path(spec string) (nixproto.StorePath, error) {
	if p, ok := c.outputs[spec]; ok {
		return p, nil
	}
	for name := range c.job.drv.Outputs {
		if spec == nixproto.Placeholder(name) {
			return c.outputs[name], nil
		}
	}
	below, ok := strings.CutPrefix(spec, nixproto.StoreDir+"/")
	if !ok {
		return "", fmt.Errorf("'%s' is neither a store path nor one of its outputs", printable(spec))
	}
	base, _, _ := strings.Cut(below, "/")
	return nixproto.ParseBaseName(base)
}

// closure returns everything that a path refers to, itself included, and the
// sum of the sizes.
func (c *outputChecker) closure(p nixproto.StorePath) (paths []nixproto.StorePath, size uint64, err error) {
	seen := map[nixproto.StorePath]bool{p: true}
	paths = []nixproto.StorePath{p}
	for i := 0; i < len(paths); i++ {
		info := c.infos[paths[i]]
		if info == nil {
			return nil, 0, fmt.Errorf("check outputs: nothing is known of %s", paths[i])
		}
		size += info.NarSize
		for _, r := range info.References {
			if !seen[r] {
				seen[r] = true
				paths = append(paths, r)
			}
		}
	}
	return paths, size, nil
}
