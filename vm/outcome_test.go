package vm

import (
	"errors"
	"strings"
	"testing"

	"nbd/vm/link"
)

// TestJudgeCutsMessages: a guest may have been taken over, and say anything.
func TestJudgeCutsMessages(t *testing.T) {
	for _, kind := range []link.Kind{link.OutputMissing, link.OutputRefused} {
		err := new(build).judge(&link.Result{Kind: kind, Message: strings.Repeat("é", 4<<20)})
		var failed *BuildError
		if !errors.As(err, &failed) || len(failed.Message) > maxMessage+len("…") || strings.Trim(failed.Message, "é…") != "" {
			t.Errorf("%s: %T with %d bytes", kind, err, len(err.Error()))
		}
	}
}
