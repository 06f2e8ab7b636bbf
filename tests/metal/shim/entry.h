// Calls a kernel with the runtime's buffers: pointers and references as they are, structs by value.
#pragma once
#include "traits.h"

template <class P>
inline P harness_argument(void* buffer) {
  if constexpr (traits::is_reference_v<P>) {
    return *static_cast<traits::remove_reference_t<P>*>(buffer);
  } else if constexpr (traits::is_pointer_v<P>) {
    return static_cast<P>(buffer);
  } else {
    return *static_cast<P*>(buffer);
  }
}

template <class T, T... I>
struct harness_indices {};

template <size_t I, class First, class... P>
struct harness_nth : harness_nth<I - 1, P...> {};
template <class First, class... P>
struct harness_nth<0, First, P...> {
  using type = First;
};

template <class... P, size_t... I, class... Words>
inline void harness_call(void (*kernel)(P...), void* const* buffers, harness_indices<size_t, I...>, Words... words) {
  kernel(harness_argument<typename harness_nth<I, P...>::type>(buffers[I])..., words...);
}
