package guest

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// bringUp brings up processors until the first n run. Guests that get theirs on
// demand have booted with one.
func bringUp(n int) error {
	for i := 1; i < n; i++ {
		file := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", i)
		state, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("there is no processor %d, of %d", i, n)
		}
		if err == nil && strings.TrimSpace(string(state)) == "0" {
			err = os.WriteFile(file, []byte("1"), 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
